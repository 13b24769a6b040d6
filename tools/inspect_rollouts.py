#!/usr/bin/env python
"""Show sampled rollouts with each token coloured by its part in the loss: trusted, outlier or guidance.

    python tools/inspect_rollouts.py runs/tiny                      # the last logged step
    python tools/inspect_rollouts.py runs/tiny --step 0 --numbers   # with rho and both log-probabilities a token
    python tools/inspect_rollouts.py runs/tiny --all | less -R

Reads samples.jsonl, which training writes (logging.samples rollouts a step).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.records.metrics import read_records

_COLOURS = {"trust": "\033[32m", "outlier": "\033[1;31m", "guidance": "\033[34m", "dropped": "\033[2m"}
_RESET = "\033[0m"
# Without colours the kinds that are not trusted are marked in the text.
_MARKS = {"trust": ("", ""), "outlier": ("[", "]"), "guidance": ("<", ">"), "dropped": ("{", "}")}


def main(argv: list[str] | None = None) -> int:
    """Print the chosen rollouts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder or samples.jsonl")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the rollouts of this step (default: of the last)")
    which.add_argument("--all", action="store_true", help="the rollouts of every step")
    parser.add_argument(
        "--numbers", action="store_true", help="one line per token with rho, weight and log-probabilities"
    )
    parser.add_argument(
        "--colour", choices=("auto", "always", "never"), default="auto", help="ANSI colours (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        samples = _choose(arguments)
    except UserError as error:
        print(f"inspect_rollouts: error: {error}", file=sys.stderr)
        return 2
    colour = arguments.colour == "always" or (arguments.colour == "auto" and sys.stdout.isatty())
    print("tokens: " + ", ".join(_paint(kind, kind, colour) for kind in _COLOURS))
    for sample in samples:
        tokens = sample["tokens"]
        counts = ", ".join(f"{sum(t['kind'] == kind for t in tokens)} {kind}" for kind in _COLOURS)
        print(f"\nstep {sample['step']}, sample {sample['sample_id']}: {counts}, finished by {sample['finish_reason']}")
        print(sample["prompt"])
        print("-> " + "".join(_paint(t["text"], t["kind"], colour) for t in tokens))
        if arguments.numbers:
            _print_numbers(tokens, colour)
    return 0


def _choose(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    path = arguments.run / "samples.jsonl" if arguments.run.is_dir() else arguments.run
    if not path.is_file():
        raise UserError(
            f"{path} does not exist; give the folder of a run that was trained with logging.samples above 0."
        )
    samples = read_records(path)
    if arguments.all or not samples:
        return samples
    step = samples[-1]["step"] if arguments.step is None else arguments.step
    chosen = [sample for sample in samples if sample["step"] == step]
    if not chosen:
        raise UserError(
            f"{path} holds no rollouts of step {step}; it holds steps {samples[0]['step']} to {samples[-1]['step']}."
        )
    return chosen


def _paint(text: str, kind: str, colour: bool) -> str:
    before, after = (_COLOURS[kind], _RESET) if colour else _MARKS[kind]
    return f"{before}{text}{after}"


def _print_numbers(tokens: list[dict[str, Any]], colour: bool) -> None:
    print(f"{'':>6}{'rho':>8}{'weight':>8}{'student':>10}{'teacher':>10}  token")
    for number, token in enumerate(tokens):
        columns = [(token.get("rho"), 8), (token.get("weight"), 8), (token.get("student_logprob"), 10)]
        columns.append((token.get("teacher_logprob"), 10))
        values = "".join(f"{'' if value is None else f'{value:.3f}':>{width}}" for value, width in columns)
        print(f"{number:>6}{values}  {_paint(repr(token['text']), token['kind'], colour)}")


if __name__ == "__main__":
    sys.exit(main())
