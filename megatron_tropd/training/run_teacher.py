"""The teacher of a run: checked before memory is spent, then built on the student's ranks or on dedicated ones.

files = check_teacher(recipe, tokenizer)
teacher = build_teacher(recipe, groups, teacher_groups, files, objective, tokenizer.vocab_size)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.config import Recipe
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.checks import check_sizes
from megatron_tropd.models.convert import check_model_files, load_model_weights, resolve_hf_path
from megatron_tropd.models.verify import verify_before_training
from megatron_tropd.numbers.finite_weights import check_loaded
from megatron_tropd.objective.objectives import Objective, build_objective
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.partition import Partition
from megatron_tropd.rollout.endings import Endings, find_endings
from megatron_tropd.teacher.exchange import Exchange
from megatron_tropd.teacher.hook import TeacherHook
from megatron_tropd.teacher.remote import RemoteTeacher
from megatron_tropd.tokenizers.tokenizer import (
    Tokenizer,
    check_compatible,
    check_vocabulary,
    load_tokenizer,
    open_tokenizer,
)


@dataclass(frozen=True)
class TeacherFiles:
    """What was found of the teacher before its weights are read."""

    hf_path: Path
    hf_config: Any
    endings: Endings  # of the student's responses


def load_student_tokenizer(recipe: Recipe) -> tuple[Path, Any, Tokenizer]:
    """Return the student's folder, its configuration and the run's tokenizer; UserError where they do not match."""
    hf_path = resolve_hf_path(recipe.student, "student")
    hf_config = load_hf_config(hf_path)
    check_model_files(recipe.student)
    tokenizer = open_tokenizer(recipe.tokenizer, recipe.student, hf_path, "student")
    check_vocabulary(tokenizer, hf_config, "student")
    return hf_path, hf_config, tokenizer


def check_teacher(recipe: Recipe, tokenizer: Tokenizer) -> TeacherFiles:
    """Read the teacher's configuration and tokenizer, and what ends responses with both models' ids.

    Raises:
        UserError: its layout does not fit its sizes, or its vocabulary is not the student's.
    """
    hf_path = resolve_hf_path(recipe.teacher, "teacher")
    hf_config = load_hf_config(hf_path)
    check_model_files(recipe.teacher)
    check_sizes(hf_config, recipe.teacher, "teacher")
    check_vocabulary(tokenizer, hf_config, "teacher")
    if recipe.tokenizer.check_compatibility:
        check_compatible(tokenizer, load_tokenizer(hf_path, with_template=False))
    return TeacherFiles(hf_path, hf_config, find_endings(recipe, "student", tokenizer))


def open_teacher(
    recipe: Recipe,
    groups: ParallelGroups,
    teacher_groups: ParallelGroups,
    partition: Partition | None,
    files: TeacherFiles,
    objective: Objective,
    vocab_size: int,
) -> TeacherHook | RemoteTeacher:
    """Build the teacher on the student's ranks, or wait until its own serve.

    Args:
        recipe: its `teacher.*` and `objective.*`.
        groups: the student's.
        teacher_groups: the teacher's over the same ranks; the student's own where the layouts are the same.
        partition: where the teacher has dedicated ranks.
        files: from `check_teacher`.
        objective: determines how many of the most probable tokens are scored.
        vocab_size: true vocabulary size.
    """
    if partition is None:
        chunks = _load(recipe, teacher_groups, files)
        multiple = teacher_groups.token_multiple(recipe.teacher)
        exchange = None if teacher_groups is groups else Exchange(groups, teacher_groups, token_multiple=multiple)
        return _hook(recipe, teacher_groups, files, objective, vocab_size, exchange).attach(chunks)
    partition.meet()
    return RemoteTeacher(
        partition,
        Exchange(groups, None, partition.bridge, wait=partition.wait),
        topk=min(objective.topk, vocab_size),
        hidden_size=files.hf_config.hidden_size,
        dtype=getattr(torch, recipe.teacher.dtype),
        with_hidden=objective.divergence is not None,
    )


def build_served_teacher(recipe: Recipe, groups: ParallelGroups, partition: Partition) -> TeacherHook:
    """On the teacher's ranks: build it, ready to serve the student's, once these are ready too."""
    objective = build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
    _, _, tokenizer = load_student_tokenizer(recipe)
    files = check_teacher(recipe, tokenizer)
    chunks = _load(recipe, groups, files)
    partition.meet()
    exchange = Exchange(None, groups, partition.bridge, groups.token_multiple(recipe.teacher), partition.wait)
    return _hook(recipe, groups, files, objective, tokenizer.vocab_size, exchange).attach(chunks)


def _load(recipe: Recipe, groups: ParallelGroups, files: TeacherFiles) -> list[torch.nn.Module]:
    config = dataclasses.replace(recipe.teacher, recompute=None)
    verify_before_training(config, groups, "teacher")
    chunks = build_model(files.hf_config, config, groups, training=False, role="teacher")
    load_model_weights(chunks, config, groups)
    check_loaded(chunks, config, "teacher")
    return chunks


def _hook(
    recipe: Recipe,
    groups: ParallelGroups,
    files: TeacherFiles,
    objective: Objective,
    vocab_size: int,
    exchange: Exchange | None,
) -> TeacherHook:
    return TeacherHook(
        groups,
        vocab_size=vocab_size,
        topk=objective.topk,
        temperature=recipe.objective.temperature,
        with_hidden=objective.divergence is not None,
        implementation=recipe.objective.kernel,
        exchange=exchange,
        offload=recipe.teacher.offload,
        end=files.endings.end_of_text(),
    )
