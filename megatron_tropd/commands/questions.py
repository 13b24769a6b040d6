"""The questions of `megatron-tropd init` on a terminal; imports nothing heavy, so that they appear at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_tropd.errors import UserError

_QUESTIONS = {
    "teacher": "Hugging Face folder of the teacher",
    "student": "Hugging Face folder of the student",
    "prompts": "file of prompts",
    "gpus": "number of GPUs",
}


def complete(arguments: argparse.Namespace) -> None:
    """Ask for each option that is missing; wrong answers are asked again.

    Raises:
        UserError: an option is missing and there is no terminal, or an answer given as an option is wrong.
    """
    missing = [name for name in _QUESTIONS if getattr(arguments, name) is None]
    if missing and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UserError(f"init needs {', '.join(f'--{name}' for name in missing)} (on a terminal it asks for them).")
    for name in _QUESTIONS:
        if name not in missing and (problem := _problem(name, str(getattr(arguments, name)))):
            raise UserError(f"--{name} {getattr(arguments, name)}: {problem}")
    for name in missing:
        answer = _ask(f"{_QUESTIONS[name]}: ", partial(_problem, name))
        setattr(arguments, name, int(answer) if name == "gpus" else answer)
    if missing and arguments.problems is None:
        arguments.problems = (
            _ask("file of problems with answers, to measure accuracy (empty: none): ", _optional) or None
        )
    if arguments.output is None:
        arguments.output = "recipe.yaml"


def _ask(question: str, problem_with: Callable[[str], str | None]) -> str:
    while True:
        try:
            answer = input(question).strip()
        except EOFError:
            raise UserError("init: the answers ended; nothing was written.") from None
        problem = problem_with(answer)
        if problem is None:
            return answer
        print(f"  {problem}")


def _optional(text: str) -> str | None:
    return _problem("problems", text) if text else None


def _problem(name: str, text: str) -> str | None:
    """Return what is wrong with an answer, as far as one look tells."""
    if name == "gpus":
        return None if text.isdecimal() and int(text) >= 1 else f"{text!r} is not a whole number of at least 1."
    if not text:
        return "an answer is needed."
    if name in ("teacher", "student"):
        if not Path(text).is_dir():
            return "there is no such folder; download the model first, for example with `hf download`."
        return None if Path(text, "config.json").is_file() else "the folder holds no config.json of Hugging Face's."
    return None if any(letter in text for letter in "*?[") or Path(text).exists() else "there is no such file."
