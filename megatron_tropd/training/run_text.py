"""The text of a training run: a block before its first step, and a table with the next commands at its end.

for name, text in start_block(run, record_start(...)): ...
print(end_text(recipe, summary, command))
"""

from __future__ import annotations

import shlex
from typing import Any

import psutil
import torch

from megatron_tropd.config import ModelConfig, Recipe, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.mcore.layer_specs import uses_transformer_engine
from megatron_tropd.methods import METHODS
from megatron_tropd.parallel.layout import short_sizes
from megatron_tropd.planning.job import job_of
from megatron_tropd.planning.memory import memories
from megatron_tropd.prompts.prompt_set import PromptSet
from megatron_tropd.recipe_changes import settings_of
from megatron_tropd.reporting.head import method
from megatron_tropd.system.launcher import launcher_local_world_size, launcher_world_size
from megatron_tropd.system.short_text import count
from megatron_tropd.training.run import Run


def start_block(run: Run, start: dict[str, Any], last_step: int) -> list[tuple[str, str]]:
    """Return (name, text) of what is about to run.

    Args:
        run: set up.
        start: this start's entry of run.json.
        last_step: the number of steps after which this start ends.
    """
    recipe, state = run.recipe, run.state
    models = start["models"]
    parts = [(role, _model(models[role], getattr(recipe, role))) for role in ("student", "teacher") if models.get(role)]
    parts.append(("method", method(settings_of(recipe))))
    parts.append(("prompts", _prompts(run)))
    if run.problems or run.held_out:
        parts.append(("measured", _measured(run)))
    parts.append(("memory", _memory(run)))
    of = "" if last_step == recipe.training.steps else f" of {recipe.training.steps:,}"
    after = f" after {state.step:,} that are done" if state.step else ""
    parts.append(("steps", f"{last_step - state.step:,}{of}{after}, a checkpoint every {_interval(recipe)}"))
    parts.append(("output", f"{run.folder}  (megatron-tropd report {run.folder} --watch)"))
    return parts


def _model(model: dict[str, Any], config: ModelConfig) -> str:
    return f"{model['path']}  {count(model['parameters'])} parameters, {config.dtype}, {_layout(config)}"


def _layout(config: ModelConfig) -> str:
    texts = short_sizes(config)
    texts += ["sequence parallel"] if config.sequence_parallel else []
    if isinstance(config, TeacherConfig) and config.ranks == "dedicated":
        texts.append(f"dedicated ranks, {config.replicas} replica{'s' if config.replicas > 1 else ''}")
    texts += ["offloaded between passes"] if isinstance(config, TeacherConfig) and config.offload else []
    return " ".join(texts[:2]) + "".join(f", {text}" for text in texts[2:])


def _prompts(run: Run) -> str:
    training, rollout = run.recipe.training, run.recipe.rollout
    text = f"{len(run.source.prompts):,} of {_name(run.recipe.data.prompts)}; {training.prompts_per_step:,} per step"
    if not run.objective.needs_rollout:
        return f"{text} with given responses, {run.groups.dp_size} replica(s)"
    longest = f"of up to {rollout.max_new_tokens:,} tokens"
    return f"{text} x {rollout.samples_per_prompt} responses {longest}, {run.groups.dp_size} replica(s)"


def _name(files: Any) -> str:
    return str(files) if not isinstance(files, list) else f"{len(files)} files, {files[0]} the first"


def _measured(run: Run) -> str:
    texts = [f"accuracy on {len(run.problems):,} problems"] if run.problems else []
    texts += ["divergence from the teacher on held-out prompts"] if run.held_out else []
    every = run.recipe.evaluation.interval
    return f"{', '.join(texts)}, {f'every {every} steps' if every else 'before and after'}"


def _interval(recipe: Recipe) -> str:
    every = recipe.checkpoint.save_interval
    return f"{every:,} steps" if every else "time that the run ends"


def _memory(run: Run) -> str:
    """Return the planned peak and the free memory, which includes what this process has allocated."""
    planned = _planned_gb(run)
    if run.groups.device.type == "cuda":
        free = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 1e9
        return f"{planned} per GPU, {free:.1f} GB free"
    free = psutil.virtual_memory().available + psutil.Process().memory_info().rss
    return f"{planned} per process, {free / 1e9:.1f} GB free on this machine"


def _planned_gb(run: Run) -> str:
    """Return the peak that the planner expects of the fullest rank, in words; without a teacher there is no plan."""
    recipe = run.recipe
    if METHODS[recipe.objective.name].data:
        return "no plan without a teacher"
    try:
        processes = launcher_world_size()
        prompts = run.source.prompts
        assert isinstance(prompts, PromptSet)  # a run's data are files
        job = job_of(recipe, processes, prompts.longest, fused=uses_transformer_engine())
        return f"{max(needed.peak for needed in memories(job)) / 1e9:.1f} GB planned for tensors"
    except UserError:  # a layout that the planner does not know
        return "no plan"


def end_text(recipe: Recipe, summary: dict[str, Any], command: list[str]) -> str:
    """Return the table of what was measured, and the commands that one types next.

    Args:
        recipe: the run's.
        summary: its summary.json.
        command: how it was started, to continue it where steps are left.
    """
    folder, checkpoint = recipe.logging.dir, summary["checkpoint"]
    lines = _table(summary["evaluations"])
    lines += ["", "next:"]
    if not summary["finished"]:
        lines.append(f"  {_launch(command)}  # goes on after step {summary['steps']:,}")
    lines.append(f"  megatron-tropd report {folder}")
    if summary["finished"] and recipe.evaluation.problems is None:
        lines.append(f"  megatron-tropd evaluate --checkpoint {checkpoint}/model --problems PROBLEMS")
    lines.append(f"  megatron-tropd convert mcore-to-hf --checkpoint {checkpoint} --output {folder}/student_hf")
    return "\n".join(lines)


def _table(evaluations: list[dict[str, Any]]) -> list[str]:
    """Return first, best and last value of each measure, with the last one's interval."""
    rows = []
    for key, name, form, best in (
        ("accuracy", "accuracy", "{:.1%}", max),
        ("held_out_kl", "held-out KL", "{:.4g}", min),
    ):
        found = [record for record in evaluations if record.get(key) is not None]
        if not found:
            continue
        values = [record[key] for record in found]
        low, high = (found[-1].get(f"{key}_{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f"{form.format(low)} to {form.format(high)}"
        rows.append((name, *(form.format(value) for value in (values[0], best(values), values[-1])), interval))
    if not rows:
        return []
    rows.insert(0, ("", "before", "best", "after", "95% interval"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "",
        *("  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]


def _launch(command: list[str]) -> str:
    """Return the command that starts this run again; under torchrun, with as many processes."""
    arguments = shlex.join(command[1:])
    processes, local = launcher_world_size(), launcher_local_world_size()
    if processes == 1:
        return f"megatron-tropd {arguments}"
    nodes = f"--nnodes {processes // local} " if processes > local else ""
    return f"torchrun {nodes}--nproc-per-node {local} -m megatron_tropd {arguments}"
