"""Chat templates: read from a file or a model's folder, compiled, and rendered to the text of a prompt.

Jinja is set up as in transformers (sandbox, `generation` tag, `tojson`, `raise_exception`), whichever release is
installed, except that `strftime_now` gives the run's date and not that of the moment.

    template = read_template("chat.jinja")
    template.render([{"role": "user", "content": "2 + 2?"}])
"""

from __future__ import annotations

import datetime
import functools
import json
import logging
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError

logger = logging.getLogger(__name__)

_REMEDY = "give tokenizer.chat_template=FILE.jinja"
_OURS = ("messages", "tools", "add_generation_prompt")  # what `render` itself passes
_QUESTIONS = ("What is 2 + 2?", "Name a colour.")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field of a message


class ChatTemplate:
    """The templates of one tokenizer by name; `default` is used, or `tool_use` for prompts with tools.

    Attributes:
        kwargs: variables for every prompt (tokenizer.chat_template_kwargs).
        date: what `strftime_now` formats; None: today.
        special_tokens: bos_token, eos_token and so on, as the template sees them.
        texts: the one text, or several by name.
    """

    def __init__(self, texts: Mapping[str, str], origins: Mapping[str, str] | str):
        """Compile `texts`; `origins` names the file of each, or of all.

        Raises:
            UserError: a template does not compile; the message gives file and line.
        """
        self.kwargs: dict[str, Any] = {}
        self.date: datetime.date | None = None
        self.special_tokens: dict[str, str] = {}
        self.texts = texts["default"] if list(texts) == ["default"] else dict(texts)
        self._origins = {name: origins if isinstance(origins, str) else origins[name] for name in texts}
        self._templates = {name: self._compile(name, text) for name, text in texts.items()}
        self._variables = {name: _variables(text) for name, text in texts.items()}
        self._parts: dict[str, bool] = {}  # by name, once it was examined: whether it wants contents as lists
        self._warned: set[str] = set()

    @property
    def uses_date(self) -> bool:
        """Whether a template asks for the current date."""
        return any("strftime_now" in variables for variables in self._variables.values())

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """Return the text of a conversation with the assistant's turn opened.

        Args:
            messages: objects with `role` and `content`.
            tools: JSON schemas, None for none.
            kwargs: variables of this prompt, which take precedence over `self.kwargs`.

        Raises:
            UserError: the template refuses the messages, fails, or renders nothing.
        """
        name = self._name(tools)
        merged = {**self.kwargs, **(kwargs or {})}
        self._check_kwargs(name, merged, tools)
        if name not in self._parts:
            self._parts[name] = self._wants_parts(name, messages, merged)
            self._check_opening(name, merged)
        text: str | None
        try:
            text = self._render(name, messages, tools, merged)
        except Exception as error:
            try:  # DeepSeek-R1's template joins the arguments of tool calls as text, others write objects as JSON
                as_text = [_with_text_arguments(message) for message in messages]
                text = self._render(name, as_text, tools, merged) if as_text != messages else None
            except Exception:
                text = None
            if text is None:
                raise UserError(self._refusal(error, name, messages, tools, merged)) from error
        if not text.strip():
            raise UserError(
                f"the chat template of {self._origins[name]} renders nothing for these messages ({_roles(messages)}): "
                f"it knows none of the roles, or expects other fields; {_REMEDY}."
            )
        return text

    def _name(self, tools: Any) -> str:
        if tools and "tool_use" in self._templates:
            return "tool_use"
        if "default" not in self._templates:
            raise UserError(
                f"there are several chat templates ({', '.join(sorted(self._templates))}) and none is named `default`; "
                f"{_REMEDY}."
            )
        return "default"

    def _compile(self, name: str, text: str) -> Any:
        from jinja2 import TemplateError, TemplateSyntaxError

        try:
            return _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise UserError(
                f"the chat template of {self._origins[name]} does not compile: line {error.lineno}: {error.message}. "
                f"Fix the template, or {_REMEDY}."
            ) from error
        except TemplateError as error:
            raise UserError(
                f"the chat template of {self._origins[name]} does not compile: {error}. Fix it, or {_REMEDY}."
            ) from error

    def _render(self, name: str, messages: list, tools: Any, kwargs: Mapping[str, Any], opened: bool = True) -> str:
        names = {"documents": None, "strftime_now": self._strftime, **self.special_tokens, **kwargs}
        return self._templates[name].render(
            messages=[self._message(message, name) for message in messages],
            tools=tools or None,
            add_generation_prompt=opened,
            **names,
        )

    def _message(self, message: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return a message as templates expect it: without empty fields, reasoning under each of its names."""
        fields = {key: value for key, value in message.items() if value is not None}
        reasoning = next((fields[key] for key in _REASONING if key in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        if self._parts.get(name) and isinstance(fields.get("content"), str):
            fields["content"] = [{"type": "text", "text": fields["content"]}]
        return fields

    def _strftime(self, form: str) -> str:
        date = self.date or datetime.date.today()
        return datetime.datetime.combine(date, datetime.time()).strftime(form)

    def _check_kwargs(self, name: str, kwargs: Mapping[str, Any], tools: Any) -> None:
        for key in kwargs:
            if key in _OURS:
                remedy = "give tools as a field of the prompt" if key == "tools" else "remove it"
                raise UserError(f"chat_template_kwargs holds {key}, which is set for every prompt; {remedy}.")
        unread = [key for key in kwargs if key not in self._variables[name]]
        unread += ["tools (of a prompt)"] if tools and "tools" not in self._variables[name] else []
        for key in unread:
            read = sorted(self._variables[name] - {*_OURS, "namespace", "range", "raise_exception", "dict"})
            self._warn(
                f"chat template of {self._origins[name]}: it never reads {key}, which has no effect (it reads "
                f"{', '.join(read) or 'no other variables'})"
            )

    def _warn(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    def _wants_parts(self, name: str, messages: list, kwargs: Mapping[str, Any]) -> bool:
        """Whether contents must be lists of parts, as templates of multimodal models expect.

        Found by two conversations with the roles of `messages` that say different things.

        Raises:
            UserError: the template shows what is said in neither form.
        """
        forms: dict[bool, list[Any]] = {
            False: list(_QUESTIONS),
            True: [[{"type": "text", "text": text}] for text in _QUESTIONS],
        }
        renders = False
        for parts, contents in forms.items():
            chats = [[{**message, "content": content} for message in messages] for content in contents]
            attempts = [self._attempt(name, chat, kwargs) for chat in chats]
            texts = [text for text in attempts if text is not None]
            if len(texts) < len(attempts):
                continue
            if texts[0] != texts[1]:
                return parts
            renders = renders or bool(texts[0].strip())
        if renders:
            raise UserError(
                f"the chat template of {self._origins[name]} does not show what the messages say ({_roles(messages)}): "
                f"every prompt would be the same; {_REMEDY}."
            )
        return False

    def _check_opening(self, name: str, kwargs: Mapping[str, Any]) -> None:
        """Warn of a template without generation prompt: a response would not follow the assistant's header."""
        question, answer = {"role": "user", "content": _QUESTIONS[0]}, "It is 4."
        opened, closed = (self._attempt(name, [question], kwargs, opened=opened) for opened in (True, False))
        whole = self._attempt(name, [question, {"role": "assistant", "content": answer}], kwargs, opened=False)
        if opened is None or opened != closed or whole is None or not whole.startswith(opened):
            return
        header = whole[len(opened) :].partition(answer)[0]
        if header.strip():  # else an answer follows the question at once, as after Mistral's [/INST]
            self._warn(
                f"chat template of {self._origins[name]}: it ignores add_generation_prompt, so responses start without "
                f"{header!r}, which it writes before an assistant's message"
            )

    def _attempt(self, name: str, messages: list, kwargs: Mapping[str, Any], opened: bool = True) -> str | None:
        try:
            return self._render(name, messages, None, kwargs, opened)
        except Exception:  # this template takes no such messages; the prompts' own may do
            return None

    def _refusal(self, error: Exception, name: str, messages: list, tools: Any, kwargs: Mapping[str, Any]) -> str:
        from jinja2 import TemplateError

        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
        place = f"the chat template of {self._origins[name]}" + (f", line {lines[-1]}," if lines else "")
        said = str(error).strip().rstrip(".") or type(error).__name__
        if not isinstance(error, TemplateError):
            said = f"{type(error).__name__}: {said}"
        verb = "refuses" if type(error) is TemplateError else "fails on"
        text = f"{place} {verb} these messages ({_roles(messages)}): {said}. "
        others = [message for message in messages if message.get("role") != "system"]
        if len(others) < len(messages):
            try:
                self._render(name, others, tools, kwargs)
            except Exception:
                pass
            else:
                return text + (
                    "It takes them without the system message: remove it or put its text into the first user message, "
                    f"or {_REMEDY}."
                )
        return text + f"Change the messages, or {_REMEDY} that takes them."


def _roles(messages: list[dict[str, Any]]) -> str:
    return "roles " + ", ".join(str(message.get("role")) for message in messages[:8])


def read_template(file: str | Path) -> ChatTemplate:
    """Read a Jinja file, UTF-8 with or without a byte order mark, any line ends; UserError if it is not one."""
    return ChatTemplate({"default": _read_text(Path(file), f"tokenizer.chat_template={file}")}, str(file))


def read_folder_template(folder: str | Path) -> ChatTemplate | None:
    """Return the templates of a Hugging Face folder, None if it has none.

    `chat_template.jinja` takes precedence over `chat_template` of tokenizer_config.json, which is a text or a list of
    named ones; `additional_chat_templates/NAME.jinja` adds others.
    """
    folder = Path(folder)
    config = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(config, list):
        config = {entry["name"]: entry["template"] for entry in config if isinstance(entry, dict)}
    texts = {"default": config} if isinstance(config, str) else dict(config or {})
    origins = {name: f"{folder / 'tokenizer_config.json'}" for name in texts}
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    for name, file in files.items():
        if file.is_file():
            texts[name], origins[name] = _read_text(file, str(file)), str(file)
    return ChatTemplate(texts, origins) if any(texts.values()) else None


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of a file, empty where there is none that can be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def parse_date(text: str) -> datetime.date:
    """Return the date of an ISO text; UserError if it is none."""
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"tokenizer.date={text} is not a date of the form 2025-01-31 ({error}).") from error


def _read_text(file: Path, name: str) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give a Jinja file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text ({error.reason} at byte {error.start}); convert it.") from error


def _variables(text: str) -> set[str]:
    """Return the names that a template reads without setting them first."""
    from jinja2 import meta

    return meta.find_undeclared_variables(_environment().parse(text))


@functools.cache
def _environment() -> Any:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}`, which marks the assistant's tokens: here only text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> jinja2.nodes.Node:
            line = next(parser.stream).lineno
            return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own escapes HTML

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment


def _with_text_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as JSON text."""

    def as_text(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": as_text(call["function"])}
        is_object = isinstance(call.get("arguments"), dict)
        return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)} if is_object else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [as_text(call) for call in calls]} if isinstance(calls, list) else message
