"""The command line `megatron-tropd`: doctor | train | generate | evaluate | data | convert | plan | report.

Under torchrun every rank runs it (`torchrun --nproc-per-node 2 -m megatron_tropd train tiny`); without torchrun it is
one process. A UserError is printed once and ends every rank with status 2. An error on a single rank ends that rank at
once, so that the launcher ends the others. cli_*.py declare the arguments; commands.py implements the commands.
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

from megatron_tropd import commands
from megatron_tropd.cli_arguments import add_command
from megatron_tropd.cli_convert import add_convert
from megatron_tropd.cli_data import add_data_arguments
from megatron_tropd.cli_plan import add_plan
from megatron_tropd.cli_report import add_report
from megatron_tropd.cli_run import add_doctor, add_evaluate, add_generate, add_train
from megatron_tropd.errors import UserError

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
    """Run the command line; return the exit status: 0 done, 1 failure or a plan that does not fit, 2 bad input."""
    arguments = _parse(argv)
    _configure_logging()
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        return _fail(f"megatron-tropd: error: {error}", 2)
    except KeyboardInterrupt:
        return _fail("megatron-tropd: interrupted", 130)
    except SystemExit as error:
        if not error.code:
            return 0
        message, status = (error.code, 1) if isinstance(error.code, str) else ("megatron-tropd: ended", error.code)
        return _fail(message, status)
    except BaseException:  # torch's CheckpointException and others are no Exception
        return _fail(traceback.format_exc().rstrip(), 1)


def _fail(message: str, status: int) -> int:
    """Print once over all ranks and leave, without waiting for ranks that may wait for this one."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
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
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron_tropd").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before, between and after options."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(
            f"unknown argument {unknown[0]!r}; `megatron-tropd {arguments.command} --help` lists what there is"
        )
    if rest:
        arguments.overrides += rest
    if hasattr(arguments, "overrides") and arguments.overrides and "=" not in arguments.overrides[0]:
        arguments.recipe = arguments.overrides.pop(0)
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="megatron-tropd",
        description="Trust Region On-Policy Distillation (TrOPD) on Megatron-Core.",
        epilog="Each command has its own --help. On several devices: torchrun --nproc-per-node N -m megatron_tropd ...",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_doctor(subcommands)
    add_train(subcommands)
    add_generate(subcommands)
    add_evaluate(subcommands)
    add_data_arguments(
        add_command(subcommands, "data", commands.data, "show how data files are read, and their problems")
    )
    add_convert(subcommands)
    add_plan(subcommands)
    add_report(subcommands)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-tropd")
    except PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
