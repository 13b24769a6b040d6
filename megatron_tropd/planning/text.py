"""A plan in words: tables of memory and time of a recipe's layout, and of the layouts that would do better.

text, fits = describe(job)
"""

from __future__ import annotations

from megatron_tropd.config import ModelConfig, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models.checks import check_sizes
from megatron_tropd.parallel.layout import check_ranks, short_sizes
from megatron_tropd.planning.host import host_memory
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import Memory, memories
from megatron_tropd.planning.proposals import proposals
from megatron_tropd.planning.runtime import nccl_connections
from megatron_tropd.planning.seconds import decode, step_seconds, work


def describe(job: Job) -> tuple[str, bool]:
    """Return the plan's text, and whether the recipe's own layout is possible and fits."""
    problem, gpu = _problem(job), job.gpu
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
        lines += [*_beside_lines(job), "", *_time_lines(job)]
    return "\n".join([*lines, "", *_proposal_lines(job)]), fits


def summary(job: Job) -> list[str]:
    """Return the plan in short: memory of the fullest GPU by phase, whether it fits, seconds per step by stage."""
    if problem := _problem(job):
        return [f"impossible: {problem}"]
    needed = max(memories(job), key=lambda memory: memory.peak)
    phases = ", ".join(f"{phase} {size / 1e9:.1f}" for phase, size in needed.phases.items())
    fits = "fits" if needed.peak <= job.gpu.room_gb * 1e9 else "DOES NOT FIT"
    return [
        f"GB per GPU: {phases}",
        f"peak {needed.peak / 1e9:.1f} GB of {job.gpu.room_gb:.0f}: {fits}",
        _time_lines(job)[0],
    ]


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


def _beside_lines(job: Job) -> list[str]:
    """Return the composition of NCCL's memory, and the host's memory."""
    roles = ("student",) if job.apart else ("student", "teacher")
    groups, peers = nccl_connections(job, roles)
    host = host_memory(job)
    return [
        f"NCCL: {groups} process groups of {job.gpu.communicator_gb:.2f} GB and {peers} peers of {job.gpu.peer_gb:.2f}",
        f"GB of a node's host memory: offloaded {host['offloaded'] / 1e9:.1f}, while a checkpoint is saved or loaded "
        f"{host['checkpoint'] / 1e9:.1f}",
    ]


def _time_lines(job: Job) -> list[str]:
    """Return the seconds of a step by stage, and what the largest parts consist of."""
    stages, step = step_seconds(job), decode(job)
    lines = [f"seconds per step, estimated: {sum(stages.values()):.3g}"]
    lines[0] += " = " + " + ".join(f"{name} {s:.3g}" for name, s in stages.items())
    how = "graphs" if step.graphed else "eager, beside the reading"
    parts = {"weights and cache": step.reading, f"launches ({how})": step.launches}
    parts |= {"engine": step.engine, "collectives": step.collectives}
    lines.append(f"a decode step of {step.batch} responses takes {1e3 * step.seconds:.1f} ms: {_milliseconds(parts)}")
    for role, name in (("teacher", "teacher scores"), ("student", "update")):
        passes = work(job, role)
        parts = {"computing": passes.computing, "launches beside it": passes.launches}
        parts |= {"collectives": passes.collectives}
        lines.append(
            f"{name}: {passes.micro_batches} micro-batches of {_milliseconds(parts)}; "
            f"waiting for pipeline stages {100 * passes.bubble:.0f} %"
        )
    return lines


def _milliseconds(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in parts.items())


def _layout(model: ModelConfig) -> str:
    replicas = model.replicas if isinstance(model, TeacherConfig) else 1
    return " ".join(short_sizes(model) + ([f"DP={replicas}"] if replicas > 1 else []))


def _conditions(job: Job, other: Job) -> str:
    """Return what a proposal sets beside layouts and recomputation."""
    keys = [("teacher", "offload"), ("training", "offload_optimizer")]
    changed = [
        f"{section}.{key}=true"
        for section, key in keys
        if getattr(getattr(other.recipe, section), key) and not getattr(getattr(job.recipe, section), key)
    ]
    return f" with {' and '.join(changed)}" if changed else ""


def _proposal_lines(job: Job) -> list[str]:
    found = proposals(job)
    if not found:
        size = f"{job.gpu.memory_gb:.0f} GB"
        return [f"no layout fits {job.gpus} GPUs of {size}: take more, or shorter or fewer responses"]
    lines = [f"layouts that fit{_conditions(job, found[0][0])}, the fastest first:"]
    lines.append(f"  {'student':<18} {'teacher':<18} {'recompute':<10} {'peak GB':>8} {'s / step':>9}")
    for other, needed, seconds in found:
        student, teacher = other.recipe.student, other.recipe.teacher
        lines.append(
            f"  {_layout(student):<18} {_layout(teacher):<18} {student.recompute or 'none':<10} "
            f"{needed.peak / 1e9:8.1f} {seconds:9.3g}"
        )
    return lines
