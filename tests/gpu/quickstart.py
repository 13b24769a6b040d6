"""The shipped small pair, distilled in one process: accuracy before and after, seconds of each stage of a step."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from gpu.stage import Stage, open_stage
from gpu.training import follow


def main() -> None:
    """Train; record what the run's files say."""
    stage = open_stage()
    run = stage.work / "quickstart"
    follow("tiny", recipe_keys(stage, run), run, lambda records: tabulate(stage, run, records))
    tabulate(stage, run, read_lines(run / "metrics.jsonl"))  # the last evaluation follows the last record
    losses = stage.figures["losses"]
    if any(loss is None for loss in losses):
        raise SystemExit("a step's loss is no finite number; see `losses`")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    stage.record(finished=summary["finished"], seconds=summary["seconds"])


def recipe_keys(stage: Stage, run: Path) -> list[str]:
    """Return overrides of the shipped recipe, which is for two CPU processes."""
    keys = [f"{role}.{key}" for role in ("student", "teacher") for key in ("tensor_model_parallel_size=1",)]
    keys += [f"{role}.dtype={stage.dtype}" for role in ("student", "teacher")]
    keys += [f"logging.dir={run}", "logging.tensorboard=false", "checkpoint.save_interval=0"]
    keys += ["training.steps=5" if stage.small else "training.steps=60"]
    if stage.small:
        problems = stage.work / "problems.jsonl"
        lines = Path("examples/tiny/problems.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        problems.write_text("".join(lines[:8]), encoding="utf-8")
        keys += [f"evaluation.problems={problems}", "training.prompts_per_step=4", "training.micro_batch_size=8"]
        keys += ["rollout.max_new_tokens=16"]
    return [*keys, *stage.overrides]


def tabulate(stage: Stage, run: Path, records: list[dict[str, Any]]) -> None:
    """Record accuracies and medians so far, these without the first step."""
    accuracies = [e["accuracy"] for e in read_lines(run / "evaluations.jsonl")]
    stage.record(losses=[record["loss"] for record in records], steps=len(records))
    if len(records) < 2:
        return
    names = ("seconds_rollout", "seconds_teacher", "seconds_update", "tokens_per_second", "logprob_mismatch")
    medians = {name: statistics.median(record[name] for record in records[1:]) for name in names}
    after = accuracies[-1] if len(accuracies) > 1 else None
    stage.record(accuracy_before=accuracies[0], accuracy_after=after)
    stage.record(first_step={name: records[0][name] for name in names}, medians=medians)
    columns = ["steps", "accuracy before", "accuracy after", "rollout, s", "teacher, s", "update, s"]
    columns += ["tokens per second", "log-prob mismatch"]
    row = [len(records), accuracies[0], after, *medians.values()]
    stage.table(f"The shipped pair in {stage.dtype}, one process; medians without the first step", columns, [row])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
