"""Short training runs of small random models: their recipes, what they record or are refused by, and their weights."""

from __future__ import annotations

import json
import re
from itertools import accumulate
from pathlib import Path

import pytest
import torch

ROLES = ("student", "teacher")
TP2, PP2 = ([f"{role}.{kind}_model_parallel_size=2" for role in ROLES] for kind in ("tensor", "pipeline"))
APART = ["teacher.ranks=dedicated"]
MEMORY = ("memory_rollout_gb", "memory_teacher_gb", "memory_update_gb")
TIMES = ("seconds_rollout", "seconds_teacher", "seconds_update", "tokens_per_second", *MEMORY)


def overrides_of(material: Path, run: Path, *extra: str) -> list[str]:
    return [
        f"student.hf_path={material / 'student'}",
        f"teacher.hf_path={material / 'teacher'}",
        f"data.prompts={material / 'prompts.jsonl'}",
        f"logging.dir={run}",
        *("student.dtype=float32", "teacher.dtype=float32", "logging.tensorboard=false"),
        *("rollout.max_new_tokens=12", "rollout.samples_per_prompt=2", "objective.topk=8", "guidance.beta=0.1"),
        *("training.steps=4", "training.prompts_per_step=4", "training.micro_batch_size=2", "training.lr=1e-2"),
        "checkpoint.save_interval=0",
        *extra,
    ]


def train_rank(overrides: list[str]) -> dict:
    from megatron_tropd import load_recipe, train

    return train(load_recipe(None, overrides))


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - set(TIMES):
            # Rounding may move a token over the edge of a bin, which is 21 % wide where quantiles are read off.
            if key.endswith("_histogram"):
                assert sum(mine[key]) == sum(other[key])
                moved = max(map(abs, accumulate(a - b for a, b in zip(mine[key], other[key], strict=True))))
                assert moved <= max(1, 0.02 * sum(other[key])), (mine["step"], key)
                continue
            relative = 0.25 if re.search(r"_p\d\d$", key) else tolerance
            assert mine[key] == pytest.approx(other[key], rel=relative, abs=tolerance), (mine["step"], key)


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp

    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size, dtype=m.properties.dtype) for k, m in metadata.items() if hasattr(m, "size")}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    return state


def refused_rank(overrides: list[str]) -> str:
    from megatron_tropd import UserError, load_recipe, train

    with pytest.raises(UserError) as error:
        train(load_recipe(None, overrides))
    return str(error.value)
