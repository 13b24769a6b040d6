"""A plan in words: tables of memory and time of a recipe's layout, and of the layouts that would do better.

text, fits = describe(job, Accelerator(memory_gb=80))
"""

from __future__ import annotations

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.layout import check_ranks
from megatron_tropd.model_checks import check_sizes
from megatron_tropd.plan import proposals, step_seconds
from megatron_tropd.plan_job import Accelerator, Job
from megatron_tropd.plan_memory import Memory, memories


def describe(job: Job, gpu: Accelerator) -> tuple[str, bool]:
    """Return the plan's text, and whether the recipe's own layout is possible and fits."""
    problem = _problem(job)
    fits = False
    if problem:
        lines = [problem]
    else:
        needed = memories(job)
        peak = max(found.peak for found in needed)
        fits = peak <= gpu.room_gb * 1e9
        lines = [line for found in needed for line in _memory_lines(found)]
        lines.append(f"peak {peak / 1e9:.1f} GB of {gpu.room_gb:.0f} ({gpu.memory_gb:.0f} less {gpu.reserve_gb:.0f})")
        lines[-1] += ": fits" if fits else ": DOES NOT FIT"
        seconds = step_seconds(job, gpu)
        lines += ["", "seconds a step, estimated: " + ", ".join(f"{name} {s:.3g}" for name, s in seconds.items())]
    return "\n".join([*lines, "", *_proposal_lines(job, gpu)]), fits


def _problem(job: Job) -> str | None:
    """Return why the recipe's layout is impossible on these GPUs."""
    try:
        for role, hf in (("student", job.student), ("teacher", job.teacher)):
            model = getattr(job.recipe, role)
            check_sizes(hf, model, role)
            check_ranks(model, job.gpus_of(role), role)
    except UserError as error:
        return str(error)
    prompts, replicas = job.recipe.training.prompts_per_step, job.replicas("student")
    if prompts % replicas:
        return f"training.prompts_per_step={prompts} cannot be split over {replicas} replicas of the student"
    return None


def _memory_lines(needed: Memory) -> list[str]:
    width = max(map(len, needed.parts))
    lines = [f"GB on a GPU of {needed.gpu}, the fullest:"]
    lines += [f"  {name:<{width}}  {size / 1e9:8.3f}" for name, size in needed.parts.items()]
    return [*lines, "at the same time:"] + [
        f"  {phase:<{width}}  {size / 1e9:8.3f}" for phase, size in needed.phases.items()
    ]


def _layout(model: ModelConfig) -> str:
    text = f"TP={model.tensor_model_parallel_size} PP={model.pipeline_model_parallel_size}"
    if model.virtual_pipeline_model_parallel_size:
        text += f" VPP={model.virtual_pipeline_model_parallel_size}"
    sizes = {"CP": model.context_parallel_size, "EP": model.expert_model_parallel_size, "DP": model.replicas}
    for name, size in sizes.items():
        text += f" {name}={size}" if size > 1 else ""
    return text


def _conditions(job: Job, other: Job) -> str:
    """Return what a proposal sets beside layouts and recomputation."""
    keys = [("teacher", "offload"), ("training", "offload_optimizer")]
    changed = [
        f"{section}.{key}=true"
        for section, key in keys
        if getattr(getattr(other.recipe, section), key) and not getattr(getattr(job.recipe, section), key)
    ]
    return f" with {' and '.join(changed)}" if changed else ""


def _proposal_lines(job: Job, gpu: Accelerator) -> list[str]:
    found = proposals(job, gpu)
    if not found:
        return [f"no layout fits {job.gpus} GPUs of {gpu.memory_gb:.0f} GB: take more, or shorter or fewer responses"]
    lines = [f"layouts that fit{_conditions(job, found[0][0])}, the fastest first:"]
    lines.append(f"  {'student':<18} {'teacher':<18} {'recompute':<10} {'peak GB':>8} {'s / step':>9}")
    for other, needed, seconds in found:
        student, teacher = other.recipe.student, other.recipe.teacher
        lines.append(
            f"  {_layout(student):<18} {_layout(teacher):<18} {student.recompute or 'none':<10} "
            f"{needed.peak / 1e9:8.1f} {seconds:9.3g}"
        )
    return lines
