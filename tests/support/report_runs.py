"""Runs for the report's tests: a short real one, and longer ones made of its records."""

from __future__ import annotations

import json
import random
from pathlib import Path

from support.helpers import run_distributed
from support.tiny_models import write_model
from support.train_runs import overrides_of, train_rank


def write_material(folder: Path) -> Path:
    """Write a student, a teacher and prompts that serve as problems and as held-out text, too."""
    write_model(folder / "student", "llama_tied", seed=1)
    write_model(folder / "teacher", "llama", seed=2, hidden_size=64)
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(7):
            prompt = {"id": f"p{i}", "messages": [{"role": "user", "content": f"add <b>{i}</b> & {3 * i}"}]}
            file.write(json.dumps({**prompt, "answer": str(4 * i), "teacher_response": f"it is {4 * i} {'!' * i}"}))
            file.write("\n")
    return folder


def train_short_run(material: Path, run: Path, *overrides: str) -> Path:
    """Train a few steps with everything that a report shows."""
    prompts = material / "prompts.jsonl"
    options = [f"evaluation.problems={prompts}", f"evaluation.held_out={prompts}", "evaluation.interval=2"]
    options += ["rollout.on_truncated=downweight", "rollout.on_repeating=mask", "rollout.on_empty=mask"]
    options += ["rollout.on_duplicate=mask"]
    run_distributed(train_rank, 1, overrides_of(material, run, *options, *overrides))
    return run


def repeat_run(run: Path, folder: Path, steps: int) -> Path:
    """Write a run of many steps whose records are the real one's, again and again, with other digits."""
    folder.mkdir(parents=True)
    for name in ("run.json", "recipe.yaml", "summary.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    records = {name: read(run / f"{name}.jsonl") for name in ("metrics", "samples", "evaluations", "answers")}
    length, digits = len(records["metrics"]), random.Random(0)
    for name, originals in records.items():
        every = length if name in ("metrics", "samples") else length * 100
        with open(folder / f"{name}.jsonl", "w") as file:
            for offset in range(0, steps, every):
                for record in originals:
                    file.write(json.dumps({**_jittered(record, digits), "step": record["step"] + offset}) + "\n")
    return folder


def _jittered(value, digits):
    if isinstance(value, dict):
        return {key: _jittered(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_jittered(item, digits) for item in value]
    return value * digits.uniform(0.9, 1.1) if isinstance(value, float) else value


def read(path: Path) -> list[dict]:
    """Return a JSONL file's objects."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
