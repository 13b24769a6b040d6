"""One row of a data file as a Prompt: columns named by the recipe, else those of the layouts that people's files have.

    layout         prompt                     answer                          teacher response
    ours           messages | text | prompt   answer                          teacher_response, last assistant turn
    ShareGPT       conversations (+ system)                                   last assistant turn (OpenThoughts, too)
    GSM8K          question                   answer, after ####
    MATH           problem                    answer, or \\boxed of solution
    verl           prompt, a list             reward_model.ground_truth
    Alpaca, Dolly  instruction + input | context                              output | response
    others         question | query | prompt  final_answer | ground_truth     response | completion

Our own names take precedence; where two others could be meant, the row is refused and the deciding key named.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from megatron_tropd.answers import last_boxed
from megatron_tropd.config import ColumnsConfig
from megatron_tropd.data_messages import (
    KNOWN_ROLES,
    check_encodable,
    check_text,
    clean_messages,
    parse_nested,
    split_response,
)
from megatron_tropd.types import Prompt

_CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input")
_PROMPTS = (*_CHATS, "text", *_QUESTIONS)
_ANSWERS = ("final_answer", "ground_truth", "expected_answer", "reward_model.ground_truth")
RESPONSES = ("completion", "response", "output")
_SYSTEMS = ("system", "system_prompt")
_INPUTS = ("input", "context")  # what an Alpaca or Dolly instruction is about
REASONS = ("teacher_finish_reason", "finish_reason")
_OWN = ("id", "messages", "text", "prompt", "answer", "teacher_response", "domain", "tools", "chat_template_kwargs")
_NOT_FOR_US = {"reward_model", "extra_info", "ability", "data_source", "solution"}  # of known layouts
KNOWN = {*_OWN, *_PROMPTS, *_ANSWERS, *RESPONSES, *_SYSTEMS, *_INPUTS, *REASONS, *_NOT_FOR_US}
# Where a value is looked for: the recipe's role, whose column takes precedence, and the columns known without it.
_SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt": ("", _PROMPTS),
    "id": ("id", ("id",)),
    "system": ("system", _SYSTEMS),
    "tools": ("tools", ("tools",)),
    "chat_template_kwargs": ("", ("chat_template_kwargs",)),
    "own answer": ("answer", ("answer",)),
    "answer": ("answer", _ANSWERS),
    "own teacher_response": ("teacher_response", ("teacher_response",)),
    "teacher_response": ("teacher_response", RESPONSES),
    "finish_reason": ("finish_reason", REASONS),
    "domain": ("domain", ("domain",)),
    "verl's domain": ("domain", ("data_source",)),
}
CUT = {"length", "max_tokens", "max_length", "model_length", "incomplete", "abort", "content_filter", "error"}


class RowReader:
    """Turns rows into Prompts and counts what it understood them as."""

    def __init__(
        self, columns: ColumnsConfig | None = None, assistant_turn: str = "response", require: tuple[str, ...] = ()
    ):
        """Take `data.columns.*`, `data.assistant_turn`, and the fields that every row must have."""
        self.columns, self.assistant_turn, self.require = columns or ColumnsConfig(), assistant_turn, require
        self.layouts: Counter[str] = Counter()
        self._chosen = {role: name for role, name in vars(self.columns).items() if name}
        self._sources: Counter[tuple[str, str]] = Counter()  # (role, column that it came from)
        self._plans: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}  # by the columns of a row
        self._plan: dict[str, tuple[str, ...]] = {}  # of the row that is read: the columns it has for each of _SOURCES
        self.roles: Counter[str] = Counter()  # of messages, those that no known template has

    def again(self) -> RowReader:
        """Return a reader of the same settings, for rows that are read once more: each row is counted once."""
        return RowReader(self.columns, self.assistant_turn, self.require)

    @property
    def sources(self) -> dict[str, list[str]]:
        """The columns that each role came from."""
        roles = dict.fromkeys(role for role, _ in self._sources)
        return {role: [name for other, name in self._sources if other == role] for role in roles}

    @property
    def fields(self) -> list[str]:
        """Every column of the rows."""
        return list(dict.fromkeys(name for columns in self._plans for name in columns))

    def names(self, columns: list[str]) -> set[str]:
        """Return those of a columnar file's columns that are read."""
        named = set(self._chosen.values())
        return {c for c in columns if c in KNOWN | named or any(name.startswith(f"{c}.") for name in named)}

    def read(self, row: dict[str, Any], default_id: str) -> Prompt:
        """Return the row's Prompt, without tokens; ValueError says what is wrong with the row."""
        self._plan = self._plans.get(tuple(row)) or self._plan_of(row)
        source = self._prompt_source(row)
        prompt = Prompt(id=self._id(row, default_id))
        self._read_prompt(prompt, row, source)
        self._read_template_fields(prompt, row)
        prompt.answer = self._answer(row)
        self._read_response(prompt, row, source)
        domain = self._named(row, "domain")
        if domain is None and "reward_model" in row:
            domain = self._named(row, "verl's domain")
        prompt.domain = None if domain is None else scalar_text(domain, "domain")
        for role in ("answer", "teacher_response"):
            if role in self.require and getattr(prompt, role) is None:
                raise ValueError(f"{role} is missing{self._hint(row, role)}")
        self.layouts[self._layout(row, source, prompt)] += 1
        return prompt

    def _plan_of(self, row: dict[str, Any]) -> dict[str, tuple[str, ...]]:
        """Work out once per set of columns which of them each value may come from."""
        plan = {}
        for source, (role, names) in _SOURCES.items():
            asked = (self._chosen[role],) if role in self._chosen else names
            plan[source] = tuple(name for name in asked if name in row or name.split(".")[0] in row)
        self._plans[tuple(row)] = plan
        return plan

    def _named(self, row: dict[str, Any], source: str) -> Any:
        """Return the value that the first of a source's columns has, None where none has one.

        Of several columns that are not ours, two with unlike values are refused.
        """
        names = self._plan[source]
        if not names:  # of most sources and rows: this runs ten times per row
            return None
        found = {name: value for name in names if (value := column_value(row, name)) is not None}
        if not found:
            return None
        name, role = next(iter(found)), _SOURCES[source][0] or source
        if (
            len(found) > 1
            and name not in _OWN
            and name not in REASONS
            and any(value != found[name] for value in found.values())
        ):
            raise ValueError(
                f"{' and '.join(found)} could each be the {role.replace('_', ' ')}; "
                + " or ".join(f"data.columns.{role}={other}" for other in found)
                + " decides"
            )
        self._count(role, name)
        return found[name]

    def _count(self, role: str, name: str) -> None:
        self._sources[role, name] += 1

    def _prompt_source(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the role (messages, text or prompt) and the column of what a response follows."""
        chosen = [(role, name) for role, name in self._chosen.items() if role in ("messages", "text", "prompt")]
        found = [(role, name) for role, name in chosen if column_value(row, name) is not None]
        if chosen and not found:
            raise ValueError(f"the column {chosen[0][1]} (data.columns.{chosen[0][0]}) is missing or null")
        if not chosen:
            names = [name for name in self._plan["prompt"] if row[name] is not None]
            if "input" in names and ("instruction" in names or len(names) > 1 or row.get("output") is None):
                names.remove("input")
            roles = {**dict.fromkeys(_CHATS, "messages"), "text": "text"}
            found = [(roles.get(name, "prompt"), name) for name in names]
        if len(found) != 1:
            names = [name for _, name in found]
            decides = " or ".join(f"data.columns.{role}={name}" for role, name in found)
            raise ValueError(
                f"expected exactly one of messages, text and prompt, found {' and '.join(names) or 'none'}"
                + (f"; {decides} decides" if found else self._hint(row, "prompt"))
            )
        self._count(*found[0])
        return found[0]

    def _hint(self, row: dict[str, Any], role: str) -> str:
        """Name the columns that there are, where one of them may be the one that is missing."""
        others = [name for name in row if name not in _OWN]
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        return f"; name its column by data.columns.{role}, of {shown}" if others else ""

    def _id(self, row: dict[str, Any], default: str) -> str:
        value = self._named(row, "id")
        return default if value is None else id_text(value)

    def _read_prompt(self, prompt: Prompt, row: dict[str, Any], source: tuple[str, str]) -> None:
        role, name = source
        value = column_value(row, name)
        if role == "text":
            prompt.text = check_text(value, name)
            return
        if role == "prompt":
            value = (
                parse_nested(value, name) if isinstance(value, str) and value.lstrip()[:2] in ("[{", "[ ") else value
            )
        if role == "messages" or isinstance(value, list):
            prompt.messages = clean_messages(value, name)
        else:
            text = check_text(value, name)
            about = self._about(row) if name == "instruction" else None
            prompt.messages = [{"role": "user", "content": text if about is None else f"{text}\n\n{about}"}]
        self._add_system(prompt, row)
        self.roles.update(m["role"] for m in prompt.messages if m["role"] not in KNOWN_ROLES)

    def _about(self, row: dict[str, Any]) -> str | None:
        found = [name for name in _INPUTS if isinstance(row.get(name), str) and row[name].strip()]
        if len(found) > 1:
            raise ValueError("input and context could each be what the instruction is about; name one column only")
        if not found:
            return None
        self._count("prompt", found[0])
        return check_text(row[found[0]], found[0])

    def _add_system(self, prompt: Prompt, row: dict[str, Any]) -> None:
        text = self._named(row, "system")
        if text is None or text == "":
            return
        message = {"role": "system", "content": check_text(text, "system")}
        if prompt.messages[0]["role"] != "system":
            prompt.messages = [message, *prompt.messages]
        elif prompt.messages[0]["content"] != text:
            raise ValueError("there is a system column and another system message in the conversation; remove one")

    def _read_template_fields(self, prompt: Prompt, row: dict[str, Any]) -> None:
        for role, kind in (("tools", list), ("chat_template_kwargs", dict)):
            value = parse_nested(self._named(row, role), role)
            if value is None or value == "":
                continue
            if not isinstance(value, kind):
                raise ValueError(
                    f"{role} is a {type(value).__name__}, expected {'a list' if kind is list else 'an object'}"
                )
            if role == "tools" and not all(isinstance(tool, dict) for tool in value):
                raise ValueError("each of tools must be an object, a JSON schema of a function")
            if value and prompt.messages is None:
                raise ValueError(f"{role} has no use beside raw text: only a chat template reads it; give messages")
            check_encodable(value, role)
            setattr(prompt, role, value or None)

    def _answer(self, row: dict[str, Any]) -> str | None:
        value = self._named(row, "own answer")
        if value is None and not self.columns.answer:
            value = self._named(row, "answer")
        if value is None and not self.columns.answer and isinstance(row.get("solution"), str):
            value = last_boxed(row["solution"])
            if value is not None:
                self._count("answer", r"solution's \boxed")
        if value is None:
            return None
        text = scalar_text(value, "answer")
        return text.rsplit("####", 1)[1].strip() if "####" in text else text

    def _read_response(self, prompt: Prompt, row: dict[str, Any], source: tuple[str, str]) -> None:
        """Set the teacher's response: a column, or the assistant's turn that ends the conversation."""
        value = self._named(row, "own teacher_response")
        if value is None and not self.columns.teacher_response:
            value = self._named(row, "teacher_response")
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):  # a conversational completion
            last = clean_messages(value, "the completion")[0]
            value = last["content"] if last["role"] == "assistant" and not last.get("tool_calls") else value
        if value is not None:
            prompt.teacher_response = check_text(value, "teacher_response")
        if prompt.messages is not None:
            prompt.messages, turn = split_response(prompt.messages, self.assistant_turn)
            if turn is not None and value is not None:
                raise ValueError(
                    "there are a teacher_response and an assistant's turn at the end of the messages; remove one"
                )
            if turn is not None:
                prompt.teacher_response = turn
                self._count("teacher_response", f"the last turn of {source[1]}")
        if prompt.teacher_response is not None:
            prompt.teacher_finish_reason = finish_reason(self._named(row, "finish_reason"))

    def _layout(self, row: dict[str, Any], source: tuple[str, str], prompt: Prompt) -> str:
        role, name = source
        if name in _CHATS:
            sharegpt = name != "messages" and "system" in row
            return "messages" if name == "messages" else "OpenThoughts" if sharegpt else "ShareGPT conversations"
        if role == "text":
            return "raw text"
        if name == "prompt" and not isinstance(row["prompt"], str):
            return "verl" if "reward_model" in row else "prompt as messages"
        answers = str(row.get("answer", ""))
        special = {"problem": "MATH", "instruction": "Dolly" if row.get("context") else "Alpaca"}
        if name == "question" and "####" in answers:
            return "GSM8K"
        second = next((n for n in ("answer", *RESPONSES, *_ANSWERS) if row.get(n) is not None), None)
        return special.get(name) or (f"{name}/{second}" if second else name)


def column_value(row: dict[str, Any], name: str) -> Any:
    """Return a column's value; `a.b` is the field b of the object in column a, where there is no column `a.b`."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    return column_value(row[outer], inner) if isinstance(row.get(outer), dict) else None


def id_text(value: Any) -> str:
    """Return an id as text, the same for 7, "7" and a column's 7.0; ValueError for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = scalar_text(value, "id")
    if not text.strip():
        raise ValueError("id is empty")
    return text


def scalar_text(value: Any, name: str) -> str:
    """Return a string or number as text; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a string or a number")
    check_encodable(value, name)
    return str(value)


def finish_reason(value: Any) -> str | None:
    """Return "length" for a response that was cut, however that is named, else what was given."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"finish_reason is a {type(value).__name__}, expected a string such as stop or length")
    return "length" if value.strip().lower() in CUT else value
