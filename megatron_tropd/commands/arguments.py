"""What the commands' parsers share: errors of one line, recipe arguments, `--help-keys` and types of numbers."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from megatron_tropd.errors import UserError

STATUSES = """exit status:
  0    done; also a training run that Ctrl-C or SIGTERM ended after it had saved, and a chat that Ctrl-C ended
  1    failed; or the answer is no: a check of `doctor` fails, a plan does not fit, rows of data cannot be used
  2    wrong input, which one line explains
  130  interrupted by Ctrl-C"""


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as a UserError: one line that names the help command, printed once over all ranks."""

    def __init__(self, *arguments: Any, **options: Any):
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, **options, "allow_abbrev": False}
        super().__init__(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message and the command that shows the usage."""
        message = re.sub(
            r"^argument (COMMAND|DIRECTION): invalid choice: (\S+) \(choose from (.*)\)$", _unknown, message
        )
        command = self.prog.partition(" ")[2]
        raise UserError(f"{command}{': ' if command else ''}{message} (`{self.prog} --help` shows how it is used)")

    def option_near(self, word: str) -> str | None:
        """Return the option that a misspelt one was probably meant to be."""
        options = [text for action in self._actions for text in action.option_strings]
        return next(iter(difflib.get_close_matches(word.split("=")[0], options, n=1, cutoff=0.6)), None)


def _unknown(match: re.Match) -> str:
    known = [name.strip().strip("'") for name in match[3].split(",")]
    near = difflib.get_close_matches(match[2].strip("'"), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
    return f"unknown {match[1].lower()} {match[2]}: {hint}"


def add_command(subcommands: Any, name: str, run: Any, summary: str, epilog: str = "") -> Parser:
    """Add a command that calls `run` with the parsed arguments; return its parser."""
    parser = subcommands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".", epilog=epilog
    )
    parser.set_defaults(run=run)
    return parser


def add_recipe_arguments(
    parser: Parser,
    metavar: str = "[RECIPE]",
    what: str = "YAML file, or the name of a shipped recipe; then recipe keys, such as training.steps=10",
) -> None:
    """Add `[RECIPE] key=value …`, or another first word, which cli.py separates after parsing, and `--help-keys`."""
    parser.add_argument("overrides", nargs="*", metavar=f"{metavar} key=value", help=what)
    parser.set_defaults(recipe=None)
    add_help_keys(parser)


def add_help_keys(parser: Parser) -> None:
    """Add `--help-keys [SECTION|WORD]`."""
    parser.add_argument(
        "--help-keys",
        action=_HelpKeys,
        nargs="?",
        metavar="SECTION|WORD",
        help="explain the recipe's keys and stop: all, those of a section (rollout), or those about a word (memory)",
    )


class _HelpKeys(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, about: str | Sequence[Any] | None, *_: Any
    ) -> None:
        from megatron_tropd.recipe import describe

        assert about is None or isinstance(about, str)  # nargs="?"
        print(describe(about))
        parser.exit()


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """Read a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def not_negative(text: str) -> float:
    """Read a finite number of at least 0."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
