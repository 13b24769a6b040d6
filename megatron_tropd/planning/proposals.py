"""Layouts of both models that fit a cluster, the fastest first.

for job, needed, seconds in proposals(Job(student_config, teacher_config, recipe, gpus=8)): ...
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

from megatron_tropd.config import ModelConfig, Recipe, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.models.checks import check_sizes
from megatron_tropd.parallel.layout import check_ranks, model_ranks
from megatron_tropd.parallel.partition import has_dedicated_teacher
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import Memory, memory
from megatron_tropd.planning.seconds import step_seconds

Model = TypeVar("Model", bound=ModelConfig)


def layouts(hf: Any, model: Model, gpus: int, node: int = 8, cp: int = 1) -> Iterator[Model]:
    """Yield the layouts of a model that its sizes and the number of GPUs allow: TP within a node, then PP.

    Experts are never split: they are replicated, or distributed over as many ranks of a node as divide their number.
    """
    experts = experts_of(hf)
    for tp, pp in itertools.product(*[[2**i for i in range(11)]] * 2):
        if tp > node or gpus % (tp * cp * pp):
            continue
        found = replace(
            model,
            num_layers_in_first_pipeline_stage=None,
            num_layers_in_last_pipeline_stage=None,
            virtual_pipeline_model_parallel_size=None,
            context_parallel_size=cp,
        )
        found = replace(found, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1)
        try:
            check_sizes(hf, found, "model")
        except UserError:
            continue
        if experts is None:
            yield found
            continue
        for ep in {1, math.gcd(experts.count, min(node, gpus // pp))}:
            distributed = replace(found, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)
            if _holds(distributed, gpus):
                yield distributed


def _holds(model: ModelConfig, gpus: int) -> bool:
    try:
        check_ranks(model, gpus)
    except UserError:
        return False
    return True


def _layout_pairs(job: Job, cp: int) -> Iterator[tuple[ModelConfig, TeacherConfig]]:
    """Yield layouts of both models: on all GPUs, or, apart, on two parts of which one has 2^i GPUs."""
    node = job.gpu.node_gpus
    powers = [2**i for i in range(job.gpus.bit_length()) if 2**i < job.gpus]
    sizes = {*powers, *(job.gpus - power for power in powers)} if job.apart else {None}
    for own in sizes:
        students = list(layouts(job.student, job.recipe.student, job.gpus - own if own else job.gpus, node, cp))
        for teacher in layouts(job.teacher, job.recipe.teacher, own or job.gpus, node, cp):
            teacher.replicas = own // model_ranks(teacher) if own else 1
            yield from ((student, teacher) for student in students)


def proposals(job: Job, count: int = 5) -> list[tuple[Job, Memory, float]]:
    """Return the fastest layouts that fit, with their memory and seconds per step; empty if none does.

    Where none fits as the recipe is, those that do with weights or optimizer in host memory, then also with context
    parallelism.
    """
    for recipe, cp in itertools.chain(*(_with_less_on_device(job.recipe, cp) for cp in (1, 2, 4, 8))):
        found = _fitting(replace(job, recipe=recipe), cp)
        if found:
            return sorted(found, key=lambda proposal: proposal[2])[:count]
    return []


def _with_less_on_device(recipe: Recipe, cp: int) -> Iterator[tuple[Recipe, int]]:
    """Yield the recipe, and others with ever more in host memory, as far as it may be there."""
    training = replace(recipe.training, offload_optimizer=recipe.student.dtype != "float32")
    teacher = replace(recipe.teacher, offload=not has_dedicated_teacher(recipe))
    recipes = [
        recipe,
        replace(recipe, teacher=teacher),
        replace(recipe, training=training),
        replace(recipe, training=training, teacher=teacher),
    ]
    yield from ((other, cp) for i, other in enumerate(recipes) if other not in recipes[:i])


def _fitting(job: Job, cp: int) -> list[tuple[Job, Memory, float]]:
    fitting = []
    for student, teacher in _layout_pairs(job, cp):
        for recompute in dict.fromkeys((job.recipe.student.recompute, "selective", "full")):
            recipe = replace(job.recipe, student=replace(student, recompute=recompute), teacher=teacher)
            other = replace(job, recipe=recipe)
            if recipe.training.prompts_per_step % other.replicas("student"):
                continue
            needed = memory(other)
            if needed.peak <= job.gpu.room_gb * 1e9:
                fitting.append((other, needed, sum(step_seconds(other).values())))
                break
    return fitting
