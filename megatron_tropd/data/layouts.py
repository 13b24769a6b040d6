"""Turns a row of a data file into a Prompt, by the columns that the recipe names, else by common layouts:

    layout         prompt                     answer                          teacher response
    ours           messages | text | prompt   answer                          teacher_response, last assistant turn
    ShareGPT       conversations (+ system)                                   last assistant turn (OpenThoughts, too)
    GSM8K          question                   answer, after ####
    MATH           problem                    answer, or \\boxed of solution
    verl           prompt, a list             reward_model.ground_truth
    Alpaca, Dolly  instruction + input | context                              output | response
    MMLU, ARC      question + choices         letter of answer | answerKey
    others         question | query | prompt  final_answer | ground_truth     response | completion

Our own names take precedence, in any letter case (AIME's Problem); a column that repeats another is skipped. If
two other columns are possible, the row is refused, and the error names the key that decides.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from megatron_tropd.config import ColumnsConfig
from megatron_tropd.data.choices import CHOICES, letter, read_choices, with_choices
from megatron_tropd.data.columns import ANSWERS, BY_LOWER_CASE, CHATS, INPUTS, KNOWN, OWN, REASONS, RESPONSES, SOURCES
from megatron_tropd.data.copies import repeated
from megatron_tropd.data.messages import (
    KNOWN_ROLES,
    check_encodable,
    check_text,
    clean_messages,
    earlier_turns,
    looks_like_messages,
    parse_nested,
    parse_tools,
    response_of,
    split_response,
)
from megatron_tropd.data.values import answer_text, column_value, finish_reason, id_text, scalar_text
from megatron_tropd.grading.answers import last_boxed
from megatron_tropd.types import Prompt

_ROLES = {**dict.fromkeys(CHATS, "messages"), "text": "text"}  # of columns, else prompt


@dataclass(frozen=True)
class _Plan:
    """What rows with one set of columns are read from."""

    columns: dict[str, tuple[str, ...]]  # by SOURCES: those that the rows have
    renamed: dict[str, str]  # a column of ours that they have in other letter case -> its name there
    only: tuple[str, str] | None = None  # role and name of the one column that the prompt can come from


class RowReader:
    """Turns rows into Prompts and counts what it understood them as."""

    def __init__(
        self, columns: ColumnsConfig | None = None, assistant_turn: str = "response", require: tuple[str, ...] = ()
    ):
        """Take `data.columns.*`, `data.assistant_turn`, and the fields that every row must have."""
        self.columns, self.assistant_turn, self.require = columns or ColumnsConfig(), assistant_turn, require
        self.layouts: Counter[str] = Counter()
        self._chosen = {role: name for role, name in vars(self.columns).items() if name}
        self.file_columns: list[str] | None = (
            None  # of a columnar file, whose rows come without those that are not read
        )
        self._sources: dict[tuple[str, str], None] = {}  # (role, column that it came from), in order
        self._plans: dict[tuple[str, ...], _Plan] = {}  # by the columns of a row
        self._plan = _Plan({}, {})  # of the row that is read
        self.not_taught = 0  # responses that the file marks as bad ones
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
        known = KNOWN | named | set(self._renamed(columns).values())
        return {c for c in columns if c in known or any(name.startswith(f"{c}.") for name in named)}

    def read(self, row: dict[str, Any], default_id: str) -> Prompt:
        """Return the row's Prompt, without tokens; ValueError names what is wrong with the row."""
        self._plan = self._plans.get(tuple(row)) or self._plan_of(row)
        if self._plan.renamed:
            row = {**row, **{ours: row[theirs] for ours, theirs in self._plan.renamed.items()}}
        source = self._prompt_source(row)
        prompt = Prompt(id=self._id(row, default_id))
        choices = self._read_prompt(prompt, row, source)
        self._read_template_fields(prompt, row)
        prompt.answer = self._answer(row, choices)
        self._read_response(prompt, row, source)
        domain = self._named(row, "domain")
        if domain is None and "reward_model" in row:
            domain = self._named(row, "verl's domain")
        prompt.domain = None if domain is None else scalar_text(domain, "domain")
        for role in self.require:
            if getattr(prompt, role) is None:
                raise ValueError(f"{role} is missing{self._hint(row, role)}")
        self.layouts[self._layout(row, source, choices)] += 1
        return prompt

    def _plan_of(self, row: dict[str, Any]) -> _Plan:
        """Work out once per set of columns which of them each value may come from."""
        columns, renamed = {}, self._renamed(row)
        for source, (role, names) in SOURCES.items():
            asked = (self._chosen[role],) if role in self._chosen else names
            columns[source] = tuple(n for n in asked if n in row or n in renamed or n.split(".")[0] in row)
        names, chosen = columns["prompt"], self._chosen.keys() & {"messages", "text", "prompt"}
        only = (_ROLES.get(names[0], "prompt"), names[0]) if len(names) == 1 and not chosen else None
        plan = self._plans[tuple(row)] = _Plan(columns, renamed, None if names == ("input",) else only)
        return plan

    def _renamed(self, columns: Any) -> dict[str, str]:
        """Return the columns that are ours but for letter case and that the recipe does not name: ours -> theirs."""
        named = {part for name in self._chosen.values() for part in (name, name.split(".")[0])}
        present = set(columns)
        found: dict[str, str] = {}
        for name in columns:
            ours = BY_LOWER_CASE.get(name.strip().lower())
            if ours is not None and ours not in present and name not in named:
                found.setdefault(ours, name)
        return found

    def _named(self, row: dict[str, Any], source: str) -> Any:
        """Return the value that the first of a source's columns has, None where none has one.

        Two columns of other formats with different values are refused.
        """
        names = self._plan.columns[source]
        if not names:  # of most sources and rows: this runs ten times per row
            return None
        if len(names) == 1 and names[0] in row:
            name, value = names[0], row[names[0]]
            if value is not None:
                self._count(SOURCES[source][0] or source, name)
            return value
        found = {name: value for name in names if (value := column_value(row, name)) is not None}
        if not found:
            return None
        name, role = next(iter(found)), SOURCES[source][0] or source
        if (
            len(found) > 1
            and name not in OWN
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
        name = self._plan.renamed.get(name, name)
        if (role, name) not in self._sources:
            self._sources[role, name] = None

    def _prompt_source(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return the role (messages, text or prompt) and the column of what a response follows."""
        only = self._plan.only
        if only is not None and row[only[1]] is not None:
            self._count(*only)
            return only
        chosen = [(role, name) for role, name in self._chosen.items() if role in ("messages", "text", "prompt")]
        found = [(role, name) for role, name in chosen if column_value(row, name) is not None]
        if chosen and not found:
            raise ValueError(f"the column {chosen[0][1]} (data.columns.{chosen[0][0]}) is missing or null")
        if not chosen:
            names = [name for name in self._plan.columns["prompt"] if row[name] is not None]
            if "input" in names and ("instruction" in names or (len(names) == 1 and row.get("output") is None)):
                names.remove("input")
            if len(names) > 1:
                copies = repeated({name: row[name] for name in names}, [row.get("input"), row.get("output")])
                names = [name for name in names if name not in copies]
            found = [(_ROLES.get(name, "prompt"), name) for name in names]
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
        others = [name for name in self.file_columns or row if name not in OWN]
        shown = ", ".join(others[:8]) + (", ..." if len(others) > 8 else "")
        return f"; name its column by data.columns.{role}, of {shown}" if others else ""

    def _id(self, row: dict[str, Any], default: str) -> str:
        value = self._named(row, "id")
        return default if value is None else id_text(value)

    def _read_prompt(self, prompt: Prompt, row: dict[str, Any], source: tuple[str, str]) -> dict[str, str] | None:
        """Set messages or text; return the options of a multiple-choice question."""
        role, name = source
        value, choices = column_value(row, name), None
        if role == "text":
            prompt.text = check_text(value, name)
            return None
        if role == "prompt" and isinstance(value, str) and looks_like_messages(value):
            value = parse_nested(value, name)
        if role == "messages" or isinstance(value, list):
            prompt.messages = clean_messages(value, name, may_be_turns=role == "messages")
        else:
            text = check_text(value, name)
            about = self._about(row) if name == "instruction" else None
            text = text if about is None else f"{text}\n\n{about}"
            choices = read_choices(row)
            if choices is not None:
                text = with_choices(text, choices)
                self._count("prompt", next(column for column in CHOICES if row.get(column)))
            prompt.messages = [{"role": "user", "content": text}]
            if row.get("history"):
                prompt.messages = [*earlier_turns(row["history"]), *prompt.messages]
                self._count("prompt", "history")
        self._add_system(prompt, row)
        for message in prompt.messages:
            if message["role"] not in KNOWN_ROLES:
                self.roles[message["role"]] += 1
        return choices

    def _about(self, row: dict[str, Any]) -> str | None:
        found = [name for name in INPUTS if isinstance(row.get(name), str) and row[name].strip()]
        if len(found) > 1:
            raise ValueError("input and context could each be what the instruction is about; name one column only")
        if not found:
            return None
        self._count("prompt", found[0])
        return check_text(row[found[0]], found[0])

    def _add_system(self, prompt: Prompt, row: dict[str, Any]) -> None:
        text = self._named(row, "system")
        if text is None or (isinstance(text, str) and not text.strip()):
            return
        message = {"role": "system", "content": check_text(text, "system")}
        messages = prompt.messages
        assert messages is not None  # only prompts of messages come here
        if messages[0]["role"] != "system":
            prompt.messages = [message, *messages]
        elif messages[0]["content"] != text:
            raise ValueError("there is a system column and another system message in the conversation; remove one")

    def _read_template_fields(self, prompt: Prompt, row: dict[str, Any]) -> None:
        for role, kind in (("tools", list), ("chat_template_kwargs", dict)):
            if not self._plan.columns[role]:
                continue
            value = parse_nested(self._named(row, role), role)
            value = parse_tools(value, role in self._chosen or row.get(role) is not None) if role == "tools" else value
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

    def _answer(self, row: dict[str, Any], choices: dict[str, str] | None) -> str | None:
        value = self._named(row, "own answer")
        if value is None and not self.columns.answer:
            value = self._named(row, "answer")
        if choices is not None:
            value = self._named(row, "choice") if value is None else value
            return None if value is None else letter(value, choices)
        if value is None and not self.columns.answer and isinstance(row.get("solution"), str):
            value = last_boxed(row["solution"])
            if value is not None:
                self._count("answer", r"solution's \boxed")
        return None if value is None else answer_text(value)

    def _read_response(self, prompt: Prompt, row: dict[str, Any], source: tuple[str, str]) -> None:
        """Set the teacher's response: a column, or the assistant's turn that ends the conversation."""
        value = self._named(row, "own teacher_response")
        if value is None and not self.columns.teacher_response:
            value = self._named(row, "teacher_response")
        if "completion" in row and row.get("label") in (False, "False", "false"):  # KTO's: nobody is to imitate it
            self.not_taught += value is not None
            value = None
        if isinstance(value, list):
            value = response_of(value, prompt.messages)
        if value is not None:
            prompt.teacher_response = check_text(value, "teacher_response")
        if prompt.messages is not None:
            messages = prompt.messages
            prompt.messages, turn = split_response(messages, self.assistant_turn)
            self.not_taught += turn is None and prompt.messages is not messages
            if turn is not None and value is not None and turn.strip() != value.strip():
                raise ValueError(
                    "there are a teacher_response and an assistant's turn at the end of the messages; remove one"
                )
            if turn is not None:
                prompt.teacher_response = turn
                self._count("teacher_response", f"the last turn of {source[1]}")
        if prompt.teacher_response is not None:
            prompt.teacher_finish_reason = finish_reason(self._named(row, "finish_reason"))

    def _layout(self, row: dict[str, Any], source: tuple[str, str], choices: dict[str, str] | None) -> str:
        role, name = source
        if choices is not None:
            return "multiple choice"
        if name in CHATS:
            sharegpt = name != "messages" and "system" in row
            return "messages" if name == "messages" else "OpenThoughts" if sharegpt else "ShareGPT conversations"
        if role == "text":
            return "raw text"
        if name == "prompt" and not isinstance(row["prompt"], str):
            return "verl" if "reward_model" in row else "prompt as messages"
        special = {"problem": "MATH", "instruction": "Dolly" if row.get("context") else "Alpaca"}
        if name == "question" and "####" in str(row.get("answer", "")):
            return "GSM8K"
        second = next((n for n in ("answer", *RESPONSES, *ANSWERS) if row.get(n) is not None), None)
        return special.get(name) or (f"{name}/{second}" if second else name)
