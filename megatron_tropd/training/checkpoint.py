"""Training checkpoints: weights, optimizer, schedule, prompt cursor and random states; atomic, resumable, keep-last.

A checkpoint is the folder `step_000010/` with `model/` (a weights checkpoint like the converter's, self-contained),
`optimizer/` (Megatron's distributed checkpoint), `rng/`, `state.json` and `recipe.yaml`. It is written under a hidden
name and renamed when whole, together with the size of every file, so that a kill at any moment leaves the one before.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.errors import UserError
from megatron_tropd.machine.random_states import load_random_states, save_random_states
from megatron_tropd.mcore.compat import (
    allocate_optimizer_state,
    load_sharded,
    put_settings_in_force,
    save_sharded,
    separate_adam_steps,
)
from megatron_tropd.models.convert import load_checkpoint_weights, save_checkpoint_weights
from megatron_tropd.models.manifest import MANIFEST, find_damage, write_manifest
from megatron_tropd.parallel.groups import ParallelGroups, on_rank_zero
from megatron_tropd.system.disk_space import checkpoint_bytes, room_or_refusal
from megatron_tropd.training.student import Student

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d+)$")
_CONTENT = {"model", "optimizer", "rng", "state.json", "recipe.yaml", MANIFEST}
_NO_ROOM = (
    "Earlier checkpoints are as they were. Make room, or copy the newest checkpoint to another checkpoint.dir, and "
    "start the command again to continue."
)
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
    contents: dict[str, str] = field(default_factory=dict)  # fingerprint.recipe_contents() of the current recipe
    guard: dict[str, Any] = field(default_factory=dict)  # NumberGuard's


def save(
    directory: str | Path,
    student: Student,
    state: TrainingState,
    hf_path: str | Path,
    recipe_file: Path,
    keep: int,
    finish_folder: Callable[[Path], None] | None = None,
) -> Path:
    """Write checkpoint `directory/step_<step>`; collective over all ranks.

    Args:
        directory: folder of the run's checkpoints.
        student: its weights, optimizer and scheduler are saved.
        state: saved as JSON.
        hf_path: Hugging Face folder whose config and tokenizer go along.
        recipe_file: the run's resolved recipe.
        keep: newest checkpoints kept, 0 for all; older ones are removed after the new one is whole.
        finish_folder: called with the checkpoint's own copy of that folder, on rank 0, before it is whole.
    """
    directory = Path(directory)
    final = directory / f"step_{state.step:06d}"
    temporary = directory / f".{final.name}.tmp"
    student.gather_parameters(wait=True)
    with room_or_refusal(temporary, final, size_of(student), _NO_ROOM):
        on_rank_zero(lambda: _fresh_folder(temporary))
        save_checkpoint_weights(student.modules, temporary / "model", hf_path, finish_folder)
        on_rank_zero(lambda: (temporary / "optimizer").mkdir())
        with student.training_state():
            allocate_optimizer_state(student.optimizer)  # if every step so far was skipped
            save_sharded(_optimizer_state(student, is_loading=False), str(temporary / "optimizer"))
        save_random_states(temporary / "rng" / f"rank_{dist.get_rank():05d}.pt")

        def publish() -> None:
            shutil.copy(recipe_file, temporary / "recipe.yaml")
            (temporary / "state.json").write_text(json.dumps(vars(state), indent=1))
            write_manifest(temporary)
            replaced = directory / f".{final.name}.replaced.tmp"
            if final.exists():  # a step trained again after a damaged or abandoned checkpoint
                os.rename(final, replaced)
            os.rename(temporary, final)
            _remove_old(directory, keep, state.step)

        on_rank_zero(publish)
    return final


def size_of(student: Student) -> int:
    """Estimate the bytes of one checkpoint; collective."""
    config = student.optimizer.chained_optimizers[0].config
    return checkpoint_bytes(student.modules, config, student.groups)


def load(path: str | Path, student: Student, with_random_states: bool = True) -> TrainingState:
    """Restore `student` and the random states from a whole checkpoint; collective over all ranks.

    The layout may differ from the one that saved: weights and optimizer reshard, the random states are then reseeded.
    Rates, decays and schedules are those that `student` was built with, at the step that the checkpoint had reached.

    Raises:
        UserError: the checkpoint cannot be read; the message names the folder.
    """
    path = Path(path)
    state = read_state(path)
    load_checkpoint_weights(student.modules, path / "model")
    with student.training_state():
        allocate_optimizer_state(student.optimizer)
        loaded = load_sharded(_optimizer_state(student, is_loading=True), str(path / "optimizer"))
        put_settings_in_force(loaded["optimizer"], student.optimizer)
        student.optimizer.load_state_dict(loaded["optimizer"])
        separate_adam_steps(student.optimizer)
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=loaded["scheduler"]["num_steps"])
    if not with_random_states:
        logger.warning("training.seed has changed: random states start over")
    elif state.layout == layout_of(student.groups):
        load_random_states(path / "rng" / f"rank_{dist.get_rank():05d}.pt")
    else:
        logger.warning("layout changed from %s: dropout's random states start over", state.layout)
    return state


def read_state(path: str | Path) -> TrainingState:
    """Read a checkpoint's state.json; UserError if it cannot be read."""
    file = Path(path) / "state.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        names = {f.name for f in fields(TrainingState)}
        return TrainingState(**{key: value for key, value in content.items() if key in names})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be read ({error}). Restore it, or move the checkpoint away to go on from the one before it."
        ) from error


def step_folders(directory: str | Path) -> list[Path]:
    """Return the folders named like checkpoints, the last step's first."""
    return [path for _, path in numbered_folders(directory)]


def numbered_folders(directory: str | Path) -> list[tuple[int, Path]]:
    """Return the same, each after its step."""
    matches = ((_NAME.match(path.name), path) for path in Path(directory).glob("step_*"))
    return sorted(((int(match[1]), path) for match, path in matches if match), key=lambda found: found[0], reverse=True)


def is_ours(path: str | Path) -> bool:
    """Whether a folder holds only files of checkpoints, complete or not."""
    return Path(path).is_dir() and {entry.name for entry in Path(path).iterdir()} <= _CONTENT


def newest(directory: str | Path) -> Path | None:
    """Return the newest whole checkpoint, skipping (with a warning) any whose files are missing or cut short."""
    for path in step_folders(directory):
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


def _remove_old(directory: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`; later ones are damaged, and count for nothing."""
    done = [path for number, path in numbered_folders(directory) if number <= step]
    for path in done[keep:] if keep else []:
        if is_ours(path):
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
