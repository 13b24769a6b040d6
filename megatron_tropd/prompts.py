"""Prompt files: JSONL to tokenized Prompts, and the order in which training draws them.

A line is an object with `messages` (chat) or `text` (raw; `prompt` is accepted for a string to be put as one user
message), and optionally `id` (default: the line's number), `answer` (for evaluation) and `teacher_response`.
Broken lines are reported by number, up to ten at a time, before anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megatron_tropd.errors import UserError
from megatron_tropd.types import Prompt

_MAX_REPORTED = 10


class PromptEncoder(Protocol):
    """The part of tokenizer.Tokenizer that is needed here."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the templated token ids."""


def load_prompts(
    path: str | Path, tokenizer: PromptEncoder, max_tokens: int | None = None, require: tuple[str, ...] = ()
) -> list[Prompt]:
    """Read and tokenize a prompt file; `index` counts its prompts from 0.

    `require` names optional fields (`answer`, `teacher_response`) that every line must have. Raises UserError with file
    and line numbers for what cannot be read, is empty, is named twice, or has more than `max_tokens` tokens.
    """
    prompts, problems, lines_of_id = [], [], {}
    for number, line in read_lines(path):
        try:
            prompt = _parse(line, number, require)
            prompt.tokens = tokenizer.encode_prompt(prompt)
            if max_tokens is not None and len(prompt.tokens) > max_tokens:
                raise ValueError(f"the prompt has {len(prompt.tokens)} tokens, more than the {max_tokens} allowed")
            first = lines_of_id.setdefault(prompt.id, number)
            if first != number:
                raise ValueError(f"id {prompt.id!r} is taken by line {first}")
        except ValueError as error:
            problems.append(f"line {number}: {error}")
            continue
        prompts.append(replace(prompt, index=len(prompts)))
    if problems:
        more = f"; and {len(problems) - _MAX_REPORTED} more" if len(problems) > _MAX_REPORTED else ""
        raise UserError(
            f"{path}: {len(problems)} unusable line{'s' if len(problems) > 1 else ''}. "
            f"{'; '.join(problems[:_MAX_REPORTED])}{more}. Mend or remove them"
            + (", or raise data.max_prompt_tokens." if "tokens, more than" in "".join(problems) else ".")
        )
    if not prompts:
        raise UserError(f"{path} holds no prompts; expected one JSON object a line with `messages` or `text`.")
    return prompts


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of the lines that are not blank; UserError if the file cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a JSONL file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it.") from error


def _parse(line: str, number: int, require: tuple[str, ...]) -> Prompt:
    """Turn one line into a Prompt without tokens; ValueError says what is wrong with it."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    given = [key for key in ("messages", "text", "prompt") if record.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"expected exactly one of messages, text and prompt, found {' and '.join(given) or 'none'}")
    prompt = Prompt(id=str(record["id"]) if record.get("id") is not None else str(number))
    value = record[given[0]]
    if given[0] == "messages":
        prompt.messages = _check_messages(value)
    elif not isinstance(value, str):
        raise ValueError(f"{given[0]} is a {type(value).__name__}, expected a string")
    elif not value.strip():
        raise ValueError(f"{given[0]} is empty")
    elif given[0] == "text":
        prompt.text = value
    else:
        prompt.messages = [{"role": "user", "content": value}]
    for key in ("answer", "teacher_response"):
        setattr(prompt, key, _optional_text(record, key, key in require))
    return prompt


def _check_messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages is empty or not a list")
    for message in messages:
        fields = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError("each of messages must be an object with string `role` and `content`")
    if not messages[-1]["content"].strip():
        raise ValueError("the last of messages has empty content")
    return messages


def _optional_text(record: dict, key: str, required: bool) -> str | None:
    value = record.get(key)
    if value is None:
        if required:
            raise ValueError(f"{key} is missing")
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key} is a {type(value).__name__}, expected a string")
    return str(value)


class PromptSource:
    """Endless prompts in an order that is a pure function of (seed, epoch); its state is one number."""

    def __init__(self, prompts: list[Prompt], seed: int = 0, shuffle: bool = True):
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self.cursor = 0  # prompts handed out so far
        self._order: tuple[int, list[int]] = (-1, [])  # epoch, place -> index into prompts

    def next(self, count: int) -> list[Prompt]:
        """Return the next `count` prompts of the global order, the same on every rank; `index` runs on over epochs."""
        drawn = []
        for index in range(self.cursor, self.cursor + count):
            epoch, place = divmod(index, len(self.prompts))
            if self._order[0] != epoch:
                self._order = (epoch, self._permutation(epoch))
            drawn.append(replace(self.prompts[self._order[1][place]], index=index))
        self.cursor += count
        return drawn

    def _permutation(self, epoch: int) -> list[int]:
        places = range(len(self.prompts))
        if not self.shuffle:
            return list(places)
        # random.Random promises one stream of random() for a seed on every Python version; shuffle() promises nothing.
        generator = random.Random(f"{self.seed}/{epoch}")
        keys = [generator.random() for _ in places]
        return sorted(places, key=keys.__getitem__)

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: the cursor, and what the order depends on."""
        digest = hashlib.sha256("\n".join(p.id for p in self.prompts).encode()).hexdigest()
        return {"cursor": self.cursor, "seed": self.seed, "shuffle": self.shuffle, "prompts": digest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; UserError if seed, shuffling or the file's ids are not what they were."""
        ours = self.state_dict()
        for key, name in (("prompts", "data.prompts"), ("seed", "data.seed"), ("shuffle", "data.shuffle")):
            if state[key] != ours[key]:
                detail = "the file's ids" if key == "prompts" else f"it was {state[key]} and is {ours[key]}"
                raise UserError(
                    f"{name} has changed since the checkpoint was written ({detail}), so the run cannot resume "
                    "exactly. Restore it, or start anew with checkpoint.resume=false or another checkpoint.dir."
                )
        self.cursor = int(state["cursor"])
