"""The command line `megatron-tropd`: init, doctor, plan, data, train, report, convert, generate, evaluate, chat.

Under torchrun every rank runs it (`torchrun --nproc-per-node 2 -m megatron_tropd train tiny`); without torchrun it is
one process. A UserError is printed once and ends every rank with status 2. An error on a single rank ends that rank at
once, so that the launcher ends the others. cli_*.py declare the arguments; commands/run.py implements the commands.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings

from megatron_tropd.commands.arguments import STATUSES, Parser
from megatron_tropd.commands.convert import add_convert
from megatron_tropd.commands.data import add_data
from megatron_tropd.commands.init import add_init
from megatron_tropd.commands.models import add_chat, add_doctor, add_evaluate, add_generate, add_train
from megatron_tropd.commands.plan import add_plan
from megatron_tropd.commands.report import add_report
from megatron_tropd.errors import UserError
from megatron_tropd.system.launcher import launcher_rank, launcher_world_size

# Warnings of Megatron-Core and PyTorch about each other and about optional parts, which a user cannot fix.
_EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed",
    r".*torch\.distributed\..* is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)
_GRACE_SECONDS = 5.0  # rank 0 prints first; see _fail


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status (cli_arguments.STATUSES)."""
    _configure_logging()
    try:
        arguments = _parse(argv)
        status = arguments.run(arguments) or 0
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(f"megatron-tropd: error: {error}", 2)
    except KeyboardInterrupt:
        return _fail("megatron-tropd: interrupted", 130)
    except BrokenPipeError:  # the reader closed the pipe, as in `megatron-tropd plan ... | head`
        return _leave_quietly()
    except SystemExit as error:
        if not error.code:
            return _leave()
        message, status = (error.code, 1) if isinstance(error.code, str) else ("megatron-tropd: ended", error.code)
        return _fail(message, status)
    except BaseException:  # torch's CheckpointException and others are no Exception
        return _fail(traceback.format_exc().rstrip(), 1)


def _leave() -> int:
    """End after --help and the like, whose text may still be on its way into a pipe."""
    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        return _leave_quietly()


def _leave_quietly() -> int:
    """End as a program that SIGPIPE ends; what is still buffered goes nowhere, and Python says nothing of it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _fail(message: str, status: int) -> int:
    """Print once over all ranks and leave, without waiting for ranks that may wait for this one."""
    rank, world_size = launcher_rank(), launcher_world_size()
    if rank > 0:
        # Nearly always rank 0 stumbles over the same thing, prints it, and the launcher ends this rank while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
        message = f"[rank {rank}] {message}"
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if world_size > 1:
        os._exit(status)  # an orderly exit would tear down process groups, which waits for the other ranks
    return status


def _configure_logging() -> None:
    rank = launcher_rank()
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron_tropd").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before, between and after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    command = parser.commands[arguments.command]
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        near = command.option_near(unknown[0])
        command.error(f"unknown argument {unknown[0]!r}{f': did you mean {near}?' if near else ''}")
    if rest:
        arguments.overrides += rest
    if hasattr(arguments, "overrides") and arguments.overrides and "=" not in arguments.overrides[0]:
        arguments.recipe = arguments.overrides.pop(0)
    return arguments


class _TopParser(Parser):
    """Shows the commands grouped by task."""

    commands: dict[str, Parser]

    def format_help(self) -> str:
        """Return the text of `megatron-tropd --help`."""
        width = max(map(len, self.commands))
        lines = ["usage: megatron-tropd COMMAND ...", "", self.description or "", ""]
        for title, names in _GROUPS.items():
            summaries = [(self.commands[name].description or "").rstrip(".") for name in names]
            pairs = zip(names, summaries, strict=True)
            lines += [f"{title}:", *(f"  {name:{width}}  {text[0].lower()}{text[1:]}" for name, text in pairs), ""]
        return "\n".join([*lines, self.epilog or "", "", STATUSES, ""])


_GROUPS = {
    "start": ("init", "doctor", "plan", "data"),
    "run": ("train", "report"),
    "models": ("convert", "generate", "evaluate", "chat"),
}
_TOP_EPILOG = """options:
  -h, --help  show this; `megatron-tropd COMMAND --help` teaches a command by example
  --version   show the version

first steps:
  megatron-tropd init --teacher TEACHER --student STUDENT --prompts prompts.jsonl --gpus 8
  torchrun --nproc-per-node 8 -m megatron_tropd doctor recipe.yaml
  torchrun --nproc-per-node 8 -m megatron_tropd train recipe.yaml
  megatron-tropd train --help-keys objective  # the objectives, and when to use which"""


def build_parser() -> _TopParser:
    """Return the parser of all commands."""
    parser = _TopParser(
        prog="megatron-tropd",
        description="Trust Region On-Policy Distillation (TrOPD) on Megatron-Core.",
        epilog=_TOP_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for add in (
        add_init,
        add_doctor,
        add_plan,
        add_data,
        add_train,
        add_report,
        add_convert,
        add_generate,
        add_evaluate,
        add_chat,
    ):
        add(subcommands)
    parser.commands = subcommands.choices
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-tropd")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
