"""The planner's choice as recipe keys: the fastest layout that fits, and what it sets.

choice = fastest(job)
choice.settings  # {"student.tensor_model_parallel_size": 2, ...}
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.parallel.layout import model_ranks
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import Memory
from megatron_tropd.planning.proposals import proposals
from megatron_tropd.planning.recipe_file import write_recipe
from megatron_tropd.recipe_changes import settings_of

_BATCH_SIZES = (256, 128, 64, 32, 16)  # of responses at once, tried from the recipe's own downwards
_ALWAYS = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "sequence_parallel")
_EXPERTS = ("expert_model_parallel_size", "expert_tensor_parallel_size")


_MARGIN = 0.05  # of a GPU's memory, kept free if possible: the plan is an estimate
_AS_FAST = 1.05  # the plan is no more exact than that, so the simpler layout of two such is taken


@dataclass(frozen=True)
class Choice:
    """A layout, as far as the planner knows it."""

    job: Job  # with the recipe of the choice
    settings: dict[str, Any]  # keys that the choice sets
    peak_gb: float
    seconds_per_step: float

    def __str__(self) -> str:
        room = self.job.gpu.room_gb
        return f"{self.peak_gb:.1f} of {room:.0f} GB per GPU, about {self.seconds_per_step:.3g} s per step"


def fastest(job: Job) -> Choice:
    """Return the fastest layout that fits, among those with as many responses at once as the recipe says, or fewer.

    Raises:
        UserError: none fits.
    """
    found = _candidates(_with_margin(job)) or _candidates(job)
    if not found:
        raise UserError(
            f"no layout of these models fits {job.gpus} GPU(s) of {job.gpu.memory_gb:.0f} GB with responses of "
            f"{job.recipe.rollout.max_new_tokens} tokens: take more GPUs (--gpus), or lower rollout.max_new_tokens."
        )
    limit = _AS_FAST * min(seconds for _, _, seconds in found)
    other, memory, seconds = min(found, key=lambda proposal: (proposal[2] > limit, _cuts(proposal[0]), proposal[2]))
    other = replace(other, gpu=job.gpu)
    return Choice(other, _changes(job, other), memory.peak / 1e9, seconds)


def _with_margin(job: Job) -> Job:
    reserve = job.gpu.reserve_gb + _MARGIN * job.gpu.memory_gb
    return replace(job, gpu=replace(job.gpu, reserve_gb=reserve))


def _candidates(job: Job) -> list[tuple[Job, Memory, float]]:
    """Return layouts that fit: with as many responses at once as the recipe says, then with fewer."""
    found = []
    most = job.recipe.rollout.max_batch_size
    for size in (most, *(size for size in _BATCH_SIZES if size < most)):
        rollout = replace(job.recipe.rollout, max_batch_size=size)
        found += proposals(replace(job, recipe=replace(job.recipe, rollout=rollout)))
        if found and found[-1][0].recipe.training.offload_optimizer == job.recipe.training.offload_optimizer:
            break  # it fits without moving anything to the host: fewer responses at once would only be slower
    return found


def write_choice(job: Job, path: str, recipe: str | None, overrides: list[str]) -> str:
    """Write a recipe that starts from another and has the fastest layout; return what was chosen, as text.

    Args:
        job: of the recipe with its overrides.
        path: of the new file.
        recipe: file or shipped name of the recipe to start from; None: the defaults.
        overrides: `section.key=value`, which the new recipe holds, too.

    Raises:
        UserError: no layout fits, or the file cannot be written.
    """
    choice = fastest(job)
    given = {text.partition("=")[0]: None for text in overrides}
    settings = settings_of(choice.job.recipe)
    heading = [f"The fastest layout for {job.gpus} GPU(s) of {job.gpu.memory_gb:.0f} GB: {choice}."]
    chosen = {key: value for key, value in settings.items() if key in choice.settings or key in given}
    write_recipe(path, chosen, heading=heading, notes={}, base=_base(recipe, path))
    return f"{path} written: {choice}. Next: megatron-tropd train {path} --dry-run"


def _base(recipe: str | None, path: str) -> str | None:
    """Return `base:` of a recipe in `path`; relative paths are relative to that file."""
    if recipe is None or not Path(recipe).is_file():
        return recipe
    return os.path.relpath(recipe, Path(path).parent)


def _cuts(job: Job) -> int:
    """Return in how many parts the two models are cut."""
    return model_ranks(job.recipe.student) + model_ranks(job.recipe.teacher)


def _changes(job: Job, other: Job) -> dict[str, Any]:
    """Return the keys of the layout: those that every reader looks for, and whatever else differs."""
    before, after = settings_of(job.recipe), settings_of(other.recipe)
    always = {f"{role}.{key}" for role in ("student", "teacher") for key in _ALWAYS}
    for role, hf in (("student", job.student), ("teacher", job.teacher)):
        always |= {f"{role}.{key}" for key in _EXPERTS} if experts_of(hf) is not None else set()
    return {key: after[key] for key in after if key in always or after[key] != before[key]}
