"""Training checkpoints: weights, optimizer, schedule, prompt cursor and random states; atomic, resumable, keep-last.

A checkpoint is the folder `step_000010/` with `model/` (a weights checkpoint like the converter's, self-contained),
`optimizer/` (Megatron's distributed checkpoint), `rng/`, `state.json` and `recipe.yaml`. It is written under a hidden
name and renamed when whole, together with the size of every file, so that a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_tropd.convert import load_checkpoint_weights, save_checkpoint_weights
from megatron_tropd.manifest import find_damage, write_manifest
from megatron_tropd.megatron_compat import allocate_optimizer_state, save_sharded, separate_adam_steps
from megatron_tropd.parallel import ParallelGroups, on_rank_zero
from megatron_tropd.train_step import Student

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)$")
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    # Only the first data-parallel rank holds a whole model-parallel shard in host memory, see checkpoint_on_one_rank.
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


@dataclass
class TrainingState:
    """What a run needs beside weights and optimizer; plain JSON."""

    step: int  # steps done
    cursor: dict[str, Any]  # PromptSource.state_dict()
    layout: dict[str, int]
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    guard: dict[str, Any] = field(default_factory=dict)  # NumberGuard's


def save(
    directory: str | Path, student: Student, state: TrainingState, hf_path: str | Path, recipe_file: Path, keep: int
) -> Path:
    """Write checkpoint `directory/step_<step>`; collective over all ranks.

    Args:
        directory: folder of the run's checkpoints.
        student: its weights, optimizer and scheduler are saved.
        state: saved as JSON.
        hf_path: Hugging Face folder whose config and tokenizer go along.
        recipe_file: the run's resolved recipe.
        keep: newest checkpoints kept, 0 for all; older ones are removed after the new one is whole.
    """
    directory = Path(directory)
    final = directory / f"step_{state.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    student.gather_parameters(wait=True)
    on_rank_zero(lambda: _fresh_folder(temporary))
    save_checkpoint_weights(student.modules, temporary / "model", hf_path)
    on_rank_zero(lambda: (temporary / "optimizer").mkdir())
    with student.training_state():
        allocate_optimizer_state(student.optimizer)  # if every step so far was skipped
        save_sharded(_optimizer_state(student, is_loading=False), str(temporary / "optimizer"))
    torch.save(_rng_state(), temporary / "rng" / f"rank_{dist.get_rank():05d}.pt")

    def publish() -> None:
        shutil.copy(recipe_file, temporary / "recipe.yaml")
        (temporary / "state.json").write_text(json.dumps(vars(state), indent=1))
        write_manifest(temporary)
        replaced = directory / f".{final.name}.replaced.tmp"
        if final.exists():  # a step trained again after a damaged or abandoned checkpoint
            os.rename(final, replaced)
        os.rename(temporary, final)
        _remove_old(directory, keep)

    on_rank_zero(publish)
    return final


def load(path: str | Path, student: Student) -> TrainingState:
    """Restore `student` and the random states from a whole checkpoint; collective over all ranks.

    The layout may differ from the one that saved: weights and optimizer reshard, the random states are then reseeded.
    """
    path = Path(path)
    load_checkpoint_weights(student.modules, path / "model")
    with student.training_state():
        allocate_optimizer_state(student.optimizer)
        sharded = _optimizer_state(student, is_loading=True)
        loaded = dist_checkpointing.load(sharded, str(path / "optimizer"))
        student.optimizer.load_state_dict(loaded["optimizer"])
        separate_adam_steps(student.optimizer)
    student.scheduler.load_state_dict(loaded["scheduler"])
    state = TrainingState(**json.loads((path / "state.json").read_text()))
    if state.layout == layout_of(student.groups):
        _set_rng_state(torch.load(path / "rng" / f"rank_{dist.get_rank():05d}.pt", weights_only=False))
    else:
        logger.warning("layout changed from %s: dropout's random states start anew", state.layout)
    return state


def newest(directory: str | Path) -> Path | None:
    """Return the newest whole checkpoint, skipping (with a warning) any whose files are missing or cut short."""
    candidates = sorted((p for p in Path(directory).glob("step_*") if _NAME.match(p.name)), reverse=True)
    for path in candidates:
        problem = find_damage(path)
        if problem is None:
            return path
        logger.warning("checkpoint %s is damaged (%s); trying the one before", path, problem)
    return None


def layout_of(groups: ParallelGroups) -> dict[str, int]:
    """Return the parallel sizes as a JSON-able dictionary."""
    return {"tp": groups.tp_size, "pp": groups.pp_size, "cp": groups.cp_size, "dp": groups.dp_size}


def _fresh_folder(temporary: Path) -> None:
    if temporary.exists():
        shutil.rmtree(temporary)
    (temporary / "rng").mkdir(parents=True)


def _remove_old(directory: Path, keep: int) -> None:
    whole = sorted(p for p in directory.glob("step_*") if _NAME.match(p.name))
    for path in whole[:-keep] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    for leftover in directory.glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _optimizer_state(student: Student, is_loading: bool) -> dict[str, Any]:
    metadata = {**_OPTIMIZER_FORMAT, "dp_cp_group": student.groups.dp_cp}
    chunks = {f"model{i}": m.sharded_state_dict(metadata=metadata) for i, m in enumerate(student.modules)}
    return {
        "optimizer": student.optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata),
        "scheduler": student.scheduler.state_dict(),
    }


def _rng_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    torch.cuda.set_rng_state(state["cuda"])
    torch.set_rng_state(state["torch"])
