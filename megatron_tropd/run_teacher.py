"""The teacher of a run: checked before memory is spent, then built on the student's ranks or reached on its own.

files = check_teacher(recipe, tokenizer)
teacher = build_teacher(recipe, groups, teacher_groups, files, objective, tokenizer.vocab_size)
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.config import Recipe
from megatron_tropd.convert import check_model_files, load_model_weights, resolve_hf_path
from megatron_tropd.end_of_text import EndOfText
from megatron_tropd.exchange import Exchange
from megatron_tropd.model import build_model, load_hf_config
from megatron_tropd.model_checks import check_sizes
from megatron_tropd.objectives import Objective, build_objective
from megatron_tropd.parallel import ParallelGroups
from megatron_tropd.partition import Partition
from megatron_tropd.remote_teacher import RemoteTeacher
from megatron_tropd.teacher import TeacherHook
from megatron_tropd.tokenizer import Tokenizer, check_compatible, load_tokenizer
from megatron_tropd.types import UserError
from megatron_tropd.verify import verify_before_training

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherFiles:
    """What was found of the teacher before its weights are read."""

    hf_path: Path
    hf_config: Any
    end: EndOfText  # end-of-text ids to merge, at all of which rollouts then end


def load_student_tokenizer(recipe: Recipe) -> tuple[Path, Any, Tokenizer]:
    """Return the student's folder, its configuration and the run's tokenizer; UserError where they do not match."""
    hf_path = resolve_hf_path(recipe.student, "student")
    hf_config = load_hf_config(hf_path)
    check_model_files(recipe.student)
    tokenizer = load_tokenizer(recipe.tokenizer.path or hf_path, recipe.tokenizer.chat_template)
    _check_vocabulary(tokenizer, hf_config, "student")
    return hf_path, hf_config, tokenizer


def check_teacher(recipe: Recipe, tokenizer: Tokenizer) -> TeacherFiles:
    """Read the teacher's configuration and tokenizer; its end-of-text ids become `tokenizer`'s too.

    Raises:
        UserError: its layout does not fit its sizes, or its vocabulary is not the student's.
    """
    hf_path = resolve_hf_path(recipe.teacher, "teacher")
    hf_config = load_hf_config(hf_path)
    check_model_files(recipe.teacher)
    check_sizes(hf_config, recipe.teacher, "teacher")
    _check_vocabulary(tokenizer, hf_config, "teacher")
    if not recipe.tokenizer.check_compatibility:
        return TeacherFiles(hf_path, hf_config, EndOfText())
    other = load_tokenizer(hf_path)
    check_compatible(tokenizer, other)
    if tokenizer.eos_ids == other.eos_ids:
        return TeacherFiles(hf_path, hf_config, EndOfText())
    logger.warning(
        "student and teacher end with different ids, %s and %s: all of them are one event",
        *(sorted(t.eos_ids) for t in (tokenizer, other)),
    )
    tokenizer.eos_ids |= other.eos_ids
    return TeacherFiles(hf_path, hf_config, EndOfText(tokenizer.eos_ids))


def _check_vocabulary(tokenizer: Tokenizer, hf_config: Any, role: str) -> None:
    if tokenizer.vocab_size > hf_config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the {role} embeds only {hf_config.vocab_size}; give the "
            f"{role}'s own tokenizer in tokenizer.path, or resize its embeddings."
        )


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
        partition: where the teacher has ranks of its own.
        files: from `check_teacher`.
        objective: says how many of the most probable tokens to score.
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
        end=files.end,
    )
