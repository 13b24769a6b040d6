"""Arguments of `megatron-tropd report`."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import add_command


def add_report(subcommands: Any) -> None:
    """Add `report`."""
    parser = add_command(
        subcommands,
        "report",
        commands.report,
        "write one interactive HTML page about a run, or a comparison of several runs",
        "examples:\n"
        "  megatron-tropd report runs/tiny\n"
        "  megatron-tropd report runs/tropd runs/opd --output runs/comparison\n"
        "  megatron-tropd report runs/tiny --watch\n\n"
        "The page (report.html) is self-contained and needs no network. It shows curves, the trust region over time,\n"
        "responses with every token coloured, answers before and after training, and the recipe.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (the recipe's logging.dir)")
    parser.add_argument(
        "--output", help="folder to write to (default: the run's folder; for several runs, `comparison` beside them)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="update the page during training, until all runs have finished"
    )
