"""What the commands' parsers share: a command, its recipe arguments, and types of numbers."""

from __future__ import annotations

import argparse
from typing import Any

_RECIPE_HELP = "YAML file, or the name of a shipped recipe"
_OVERRIDES_HELP = "recipe keys, such as training.steps=10; `megatron-tropd train --help-keys` lists all"


def add_command(subcommands: Any, name: str, run: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    """Add a command that calls `run` with the parsed arguments; return its parser."""
    parser = subcommands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `[RECIPE] key=value …`, which cli.py separates after parsing."""
    parser.add_argument("overrides", nargs="*", metavar="[RECIPE] key=value", help=f"{_RECIPE_HELP}; {_OVERRIDES_HELP}")
    parser.set_defaults(recipe=None)


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def not_negative(text: str) -> float:
    """Read a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def above_zero(text: str) -> float:
    """Read a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value
