"""Decides where a run begins: at step 0, after its newest complete checkpoint, or not at all if it has finished.

`prepare` decides from files alone, before a model is built: it compares the checkpoint's recipe with the new one key
by key (recipe_changes.py), and refuses what cannot be continued. `restore` loads the checkpoint and only then, when
everything has been accepted, writes recipe.yaml (the current recipe) and recipes.jsonl (which recipe was used
from which step on). Each checkpoint holds the recipe with which it was written.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.methods import METHODS
from megatron_tropd.models.auto_dtype import resolve_dtypes
from megatron_tropd.objective.objectives import exploration_steps
from megatron_tropd.parallel.groups import ParallelGroups, from_rank_zero, on_rank_zero
from megatron_tropd.parallel.partition import Partition
from megatron_tropd.prompts.fingerprint import read_config, recipe_contents
from megatron_tropd.prompts.source import PromptSource
from megatron_tropd.recipe import to_yaml
from megatron_tropd.recipe_changes import (
    APPLIED,
    FIXED,
    IRRELEVANT,
    PINNED,
    Change,
    compare,
    describe,
    read_settings,
    refuse,
    settings_of,
)
from megatron_tropd.records.metrics import JSONL_FILES, is_record_file
from megatron_tropd.reporting import provenance
from megatron_tropd.system.disk_space import check_checkpoints
from megatron_tropd.system.json_files import has_keys, refuse_foreign, refuse_unwritable, write_json, write_text
from megatron_tropd.system.run_lock import RunLock
from megatron_tropd.training import checkpoint
from megatron_tropd.training.student import Student

logger = logging.getLogger(__name__)

HISTORY = "recipes.jsonl"
_SECTIONS = ("student", "teacher", "training", "logging")  # of every recipe.yaml that a run ever wrote


@dataclass
class Start:
    """Where a run begins."""

    contents: dict[str, str]  # digests of the files that the recipe names
    checkpoint: Path | None = None
    step: int = 0
    last_step: int = 0  # after which this command stops
    changes: list[Change] = field(default_factory=list)
    pinned: dict[str, Any] = field(default_factory=dict)  # values that the new recipe leaves to the checkpoint's
    lock: RunLock | None = None  # to be held while the run writes

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.checkpoint is not None and self.step >= self.last_step

    def pin(self, recipe: Recipe) -> None:
        """Set the keys that the recipe leaves to the checkpoint's."""
        for key, value in self.pinned.items():
            section, name = key.split(".")
            setattr(getattr(recipe, section), name, value)

    @property
    def keeps_random_states(self) -> bool:
        """Whether the checkpoint's random states go on; another seed begins its own."""
        return all(change.key != "training.seed" for change in self.changes)


def checkpoint_folder(recipe: Recipe) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(recipe.checkpoint.dir or Path(recipe.logging.dir) / "checkpoints")


def _locked_folders(recipe: Recipe) -> list[Path]:
    return [Path(recipe.logging.dir), checkpoint_folder(recipe)]


def prepare(
    recipe: Recipe, groups: ParallelGroups, lock: RunLock | None = None, partition: Partition | None = None
) -> Start:
    """Decide where the run begins, and refuse what cannot; collective, reads a few files on rank 0 and writes none.

    In `recipe`, what its first start fixed is set to the checkpoint's, and what is left open (`dtype: auto`, the end of
    reopold's exploration) is resolved.

    Args:
        recipe, groups: of the run.
        lock: to be taken on the run's folders by `restore`; refused here already where another run holds it.
        partition: where the teacher has dedicated ranks; both parts then call this.

    Raises:
        UserError: no checkpoint is whole, the recipe changes what cannot change within a run, the run has finished
            with other settings, or the run's folder holds files of another origin under the names that it needs.
    """

    def decide_now() -> Start:
        found = decide(recipe)
        if not found.is_finished:
            refuse_unwritable(recipe.logging.dir, f"logging.dir={recipe.logging.dir}")
            refuse_unwritable(checkpoint_folder(recipe), f"checkpoint.dir={recipe.checkpoint.dir}")
            if lock is not None:
                lock.probe(_locked_folders(recipe))
        return found

    start = from_rank_zero(decide_now)
    start.lock = lock
    start.pin(recipe)
    resolve_dtypes(recipe, partition)
    objective = recipe.objective
    if METHODS[objective.name].selects == "phases":  # fixed now: a run that is made longer must not explore again
        objective.exploration_steps = exploration_steps(objective, recipe.training.steps)
    if start.pinned and groups.rank == 0:
        logger.info("kept from the run's first start: %s", ", ".join(f"{k}={v}" for k, v in start.pinned.items()))
    if start.checkpoint is not None and groups.rank == 0:
        differences = f"; the recipe differs from the checkpoint's:\n{describe(start.changes)}" if start.changes else ""
        what = "finished already, nothing to do:" if start.is_finished else "resuming from"
        logger.warning("%s %s after step %d%s", what, start.checkpoint, start.step, differences)
    return start


def decide(recipe: Recipe) -> Start:
    """Decide where a run would begin, from files alone; `prepare` is its collective form and documents the errors."""
    folder, checkpoints = Path(recipe.logging.dir), checkpoint_folder(recipe)
    _refuse_foreign_files(folder, checkpoints)
    training = recipe.training
    start = Start(recipe_contents(recipe), last_step=min(training.steps, training.exit_step or training.steps))
    if not recipe.checkpoint.resume:
        return start
    start.checkpoint = checkpoint.newest(checkpoints)
    if start.checkpoint is None:
        damaged = checkpoint.step_folders(checkpoints)
        if damaged:
            raise UserError(
                f"none of the {len(damaged)} checkpoints in {checkpoints} is whole, so the run cannot continue. "
                "Restore one of them, or start over with checkpoint.resume=false or another logging.dir."
            )
        return start
    saved = checkpoint.read_state(start.checkpoint)
    start.step = saved.step
    old = read_settings(start.checkpoint / "recipe.yaml")
    new = settings_of(recipe)
    start.pinned = {key: old[key] for key, open_ in PINNED.items() if new[key] == open_ and old.get(key) is not None}
    start.changes = compare(old, new | start.pinned, saved.contents, start.contents)
    if start.is_finished:
        _refuse_other_settings(start, recipe)
        return start
    _refuse_other_student(start.checkpoint, recipe)
    # Of the prompts PromptSource decides (`restore`): their file may be written differently and hold the same.
    refuse(
        [c for c in start.changes if c.key != "data.prompts"],
        f"the run cannot continue from {start.checkpoint}",
    )
    return start


def _refuse_other_settings(start: Start, recipe: Recipe) -> None:
    """A finished run is what it was trained as: other settings would have no effect, which must not pass unnoticed."""
    differing = [change for change in start.changes if change.kind in (APPLIED, FIXED)]
    if not differing:
        return
    raise UserError(
        f"the run in {recipe.logging.dir} has done its {start.step} steps with other settings, and nothing was trained "
        f"with these: {'; '.join(map(str, differing))}. Give another logging.dir for a new run, raise training.steps "
        "to continue this one, or restore the settings."
    )


def _refuse_other_student(path: Path, recipe: Recipe) -> None:
    """Name what differs in the architecture, before a load fails at it."""
    student = recipe.student
    folder = Path(student.checkpoint) / "hf" if student.checkpoint is not None else None
    own = folder if student.hf_path is None else Path(student.hf_path)
    assert own is not None  # a recipe without either is refused before
    ours, theirs = read_config(own), read_config(path / "model" / "hf")
    keys = [k for k in theirs if k in ours and ours[k] != theirs[k] and isinstance(theirs[k], int | float | dict)]
    keys = [k for k in keys if not k.endswith("_token_id")]
    if keys:
        what = ", ".join(f"{key} is {ours[key]} and was {theirs[key]}" for key in keys[:4])
        raise UserError(
            f"{own} is not the student that {path} was trained from: {what}. Restore student.hf_path, or start a new "
            "run with another logging.dir."
        )


def _refuse_foreign_files(folder: Path, checkpoints: Path) -> None:
    """Raise UserError where a file that the run would replace is not one of a run."""
    key = "logging.dir holds"
    refuse_foreign(folder / "recipe.yaml", _is_whole_recipe, "a run's resolved recipe", key)
    refuse_foreign(folder / "summary.json", has_keys("steps", "finished", "checkpoint"), "a run's summary", key)
    refuse_foreign(folder / provenance.FILE, has_keys("starts"), "a run's record of its starts", key)
    for name in (*JSONL_FILES, HISTORY):
        refuse_foreign(folder / name, is_record_file, "a run's records", key)
    for path in checkpoint.step_folders(checkpoints):
        if not checkpoint.is_ours(path):
            raise UserError(
                f"{path} has the name of a checkpoint of this run and holds other files: it is left as it is. Give "
                "another checkpoint.dir, or move it away."
            )


def _is_whole_recipe(path: Path) -> bool:
    settings = read_settings(path)
    return all(any(key.startswith(f"{section}.") for key in settings) for section in _SECTIONS) and len(settings) > 40


def restore(
    recipe: Recipe, groups: ParallelGroups, student: Student, source: PromptSource, start: Start
) -> checkpoint.TrainingState:
    """Load the checkpoint to start from, if there is one, and apply the recipe; collective.

    Raises:
        UserError: the prompts are not those of the checkpoint, or the checkpoint cannot be read. Then recipe.yaml is
            left as it is.
    """
    layout = checkpoint.layout_of(groups)
    state = checkpoint.TrainingState(step=0, cursor=source.state_dict(), layout=layout)
    if start.checkpoint is not None:
        source.load_state_dict(checkpoint.read_state(start.checkpoint).cursor)
        state = checkpoint.load(start.checkpoint, student, with_random_states=start.keeps_random_states)
        state.layout = layout
    state.contents = start.contents
    _foresee_room(recipe, student, start)
    on_rank_zero(lambda: _take_lock(recipe, start))
    on_rank_zero(lambda: _put_in_force(recipe, start))
    student.gather_parameters()
    student.leave_device()
    return state


def _take_lock(recipe: Recipe, start: Start) -> None:
    """Hold the run's folders, and refuse to go on if another run wrote to them since `prepare`."""
    if start.lock is None:
        return
    start.lock.take(_locked_folders(recipe))
    folder = checkpoint_folder(recipe)
    if recipe.checkpoint.resume and checkpoint.newest(folder) != start.checkpoint:
        raise UserError(
            f"another run wrote checkpoints to {folder} while this one was starting; start the command again to "
            "continue from them, or give another logging.dir."
        )


def _foresee_room(recipe: Recipe, student: Student, start: Start) -> None:
    size, interval, folder = checkpoint.size_of(student), recipe.checkpoint.save_interval, checkpoint_folder(recipe)
    steps = range(start.step + 1, start.last_step + 1)
    saves = sum(step == start.last_step or (interval > 0 and step % interval == 0) for step in steps)
    existing = checkpoint.step_folders(folder) if start.checkpoint else []
    on_rank_zero(lambda: check_checkpoints(folder, existing, size, recipe.checkpoint.keep, saves))


def _put_in_force(recipe: Recipe, start: Start) -> None:
    folder = Path(recipe.logging.dir)
    if start.checkpoint is None:
        _set_aside(checkpoint_folder(recipe))
    write_text(folder / "recipe.yaml", to_yaml(recipe))
    history = folder / HISTORY
    lines = history.read_text(encoding="utf-8").split("\n") if history.exists() else []
    entries = [entry for entry in map(_entry, lines) if entry and entry["step"] < start.step]
    if entries and not any(change.kind != IRRELEVANT for change in start.changes):
        if len(entries) == sum(map(bool, lines)):
            return
    else:
        changes = [str(change) for change in start.changes]
        entries.append({"step": start.step, "changes": changes, "recipe": settings_of(recipe)})
    write_text(history, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _set_aside(checkpoints: Path) -> None:
    """Move an earlier run's checkpoints out of the way of a run that starts over in the same folder.

    A later resume would take the one with the highest step for its own.
    """
    earlier = checkpoint.step_folders(checkpoints)
    if not earlier:
        return
    number = 1
    while (aside := checkpoints / f"earlier_{number}").exists():
        number += 1
    aside.mkdir()
    for path in earlier:
        os.rename(path, aside / path.name)
    logger.warning("checkpoint.resume=false: the checkpoints that were in %s are now in %s", checkpoints, aside)


def finished_summary(recipe: Recipe, start: Start, groups: ParallelGroups) -> dict[str, Any]:
    """Return the summary of a finished run; write it if a kill prevented that."""

    def read() -> dict[str, Any]:
        path = Path(recipe.logging.dir) / "summary.json"
        summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if summary.get("steps") != start.step:
            assert start.checkpoint is not None  # a finished run has one
            summary = {
                "steps": start.step,
                "finished": start.step >= recipe.training.steps,
                "seconds": 0.0,
                "evaluations": checkpoint.read_state(start.checkpoint).evaluations,
                "checkpoint": str(start.checkpoint),
            }
            write_json(path, summary)
        return {**summary, "nothing_to_do": True}

    return from_rank_zero(read)
