"""`megatron-tropd init`: from two models, a prompt file and a number of GPUs to a recipe that runs.

Nothing of the weights is read but names and shapes. What is wrong with models or data is found here, as `train` would
find it, before GPUs are spent.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.methods import METHODS, is_guided
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.planning.accelerator import Accelerator
from megatron_tropd.planning.choice import Choice, fastest
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.recipe_file import write_recipe
from megatron_tropd.prompts.prompt_set import PromptSet
from megatron_tropd.recipe import load_recipe
from megatron_tropd.recipe_changes import settings_of
from megatron_tropd.rounding import ceil_div
from megatron_tropd.training.run_data import load_problems_of, open_prompts
from megatron_tropd.training.run_teacher import check_teacher, load_student_tokenizer
from megatron_tropd.validation import validate

_TOKENS = 16_384  # of a micro-batch: enough rows of a matrix to keep a GPU busy
_LEAST_ROOM = 16  # tokens that a response must have beside the longest prompt


@dataclass(frozen=True)
class Wishes:
    """What `init` was told."""

    teacher: str
    student: str
    prompts: str
    gpus: int
    output: str
    method: str = "tropd"
    dtype: str = "bfloat16"
    problems: str | None = None
    gpu_memory: float | None = None


@dataclass(frozen=True)
class Found:
    """What the files say."""

    prompts: PromptSet
    student: Any  # Hugging Face configs
    teacher: Any


def make_recipe(wishes: Wishes) -> str:
    """Check models and data, choose a layout, write the recipe; return what to do next, as text.

    Raises:
        UserError: a model or a file cannot be used, or no layout fits.
    """
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # it warns of long prompts
    recipe = load_recipe(None, _overrides(wishes))
    found = _check_files(recipe)
    settings, notes = _settings(wishes, recipe, found)
    recipe = load_recipe(None, _as_overrides(settings))
    gpu = Accelerator()
    gpu = replace(gpu, memory_gb=wishes.gpu_memory) if wishes.gpu_memory else gpu
    choice = _choose(Job(found.student, found.teacher, recipe, wishes.gpus, found.prompts.longest, gpu=gpu))
    settings = _sorted(settings | choice.settings)
    recipe = load_recipe(None, _as_overrides(settings))
    validate(recipe)
    build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
    write_recipe(wishes.output, settings, heading=_heading(wishes, choice), notes=notes)
    return _next_steps(wishes, recipe, found, choice)


def _choose(job: Job) -> Choice:
    """Return the fastest layout with about `_TOKENS` per micro-batch, or with fewer where none fits so."""
    rows = job.recipe.training.prompts_per_step * job.recipe.rollout.samples_per_prompt
    size = max(1, min(_TOKENS // job.sequence, rows // job.gpus))
    size = 1 << (size.bit_length() - 1)
    while True:
        training = replace(job.recipe.training, micro_batch_size=size)
        try:
            choice = fastest(replace(job, recipe=replace(job.recipe, training=training)))
        except UserError:
            if size == 1:
                raise
            size //= 2
        else:
            return replace(choice, settings={"training.micro_batch_size": size, **choice.settings})


def _overrides(wishes: Wishes) -> list[str]:
    overrides = [f"student.hf_path={wishes.student}", f"teacher.hf_path={wishes.teacher}"]
    overrides += [f"data.prompts={wishes.prompts}", f"objective.name={wishes.method}"]
    overrides += [f"{role}.dtype={wishes.dtype}" for role in ("student", "teacher")]
    return overrides + ([f"evaluation.problems={wishes.problems}"] if wishes.problems else [])


def _as_overrides(settings: dict[str, Any]) -> list[str]:
    return [f"{key}={'null' if value is None else value}" for key, value in settings.items()]


def _check_files(recipe: Recipe) -> Found:
    _, student, tokenizer = load_student_tokenizer(recipe)
    teacher = check_teacher(recipe, tokenizer).hf_config
    prompts = open_prompts(recipe, tokenizer, None)
    prompts.problems.raise_if_any("`megatron-tropd data FILE` shows how the file is read")
    context = student.max_position_embeddings
    if prompts.longest + _LEAST_ROOM > context:
        raise UserError(
            f"data.prompts={recipe.data.prompts}: the longest prompt has {prompts.longest} tokens, which leaves no "
            f"room for a response in the student's context of {context} tokens. Leave such prompts out of the file."
        )
    recipe.rollout.max_new_tokens = min(recipe.rollout.max_new_tokens, context - prompts.longest)
    load_problems_of(recipe, tokenizer, context)
    return Found(prompts, student, teacher)


def _settings(wishes: Wishes, recipe: Recipe, found: Found) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the recipe's keys but for the layout, and comments in place of their help."""
    runs = _unused(f"runs/{Path(wishes.output).stem}")
    prompts, longest = len(found.prompts), found.prompts.longest
    per_step = min(recipe.training.prompts_per_step, 1 << (prompts.bit_length() - 1))
    settings: dict[str, Any] = {
        "student.hf_path": wishes.student,
        "student.dtype": wishes.dtype,
        "teacher.hf_path": wishes.teacher,
        "teacher.dtype": wishes.dtype,
        "data.prompts": wishes.prompts,
        "rollout.samples_per_prompt": recipe.rollout.samples_per_prompt,
        "rollout.max_new_tokens": recipe.rollout.max_new_tokens,
        "objective.name": wishes.method,
        "training.steps": recipe.training.steps,
        "training.prompts_per_step": per_step,
        "training.lr": recipe.training.lr,
        "checkpoint.save_interval": recipe.checkpoint.save_interval,
        "logging.dir": f"{runs}/train",
    }
    notes = {
        "student.hf_path": "learns; `megatron-tropd convert hf-to-mcore` makes a checkpoint that starts faster",
        "teacher.hf_path": "is frozen",
        "data.prompts": f"{prompts:,} prompts of up to {longest:,} tokens",
        "rollout.max_new_tokens": f"longest response; the context of {found.student.max_position_embeddings:,} tokens "
        "holds it after the longest prompt",
        "objective.name": f"{METHODS[wishes.method].what}; others: `megatron-tropd train --help-keys objective`",
        "training.prompts_per_step": f"an epoch is {ceil_div(prompts, per_step):,} steps",
        "training.micro_batch_size": f"sequences per forward pass: up to {_TOKENS:,} tokens, as far as memory allows",
        "logging.dir": "everything that the run writes; `megatron-tropd report` makes a page of it",
        "rollout.max_batch_size": "responses at once per replica; fewer need less memory for their KV cache",
    }
    notes |= {f"{role}.recompute": "activations computed again in the backward pass" for role in ("student", "teacher")}
    if _must_write_responses(recipe, found):
        settings["guidance.responses"] = f"{runs}/responses.jsonl"
        notes["guidance.responses"] = (
            "the teacher's, written by `megatron-tropd generate` before training (see the top)"
        )
    if wishes.problems:
        settings |= {"evaluation.problems": wishes.problems, "evaluation.interval": 50}
    return settings, notes


def _unused(folder: str) -> str:
    """Return the folder's name, with a number where an earlier run has it."""
    names = (folder, *(f"{folder}_{number}" for number in range(2, 1000)))
    return next((name for name in names if not Path(name).exists()), folder)


def _must_write_responses(recipe: Recipe, found: Found) -> bool:
    return is_guided(recipe.objective.name) and bool(found.prompts.ids_without_response)


def _sorted(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the keys in the order of the recipe's documentation, section by section."""
    return {key: settings[key] for key in settings_of(Recipe()) if key in settings}


def _heading(wishes: Wishes, choice: Choice) -> list[str]:
    lines = [
        f"Distils {wishes.teacher} into {wishes.student} on {wishes.gpus} GPU(s) of {choice.job.gpu.memory_gb:.0f} GB.",
        f"Planned, if every response reaches its greatest length: {choice}.",
        "Keys that are not here have the paper's values. The commands:",
    ]
    return [*lines, *(f"  {command}" for command in _commands(wishes, choice.job.recipe))]


def _commands(wishes: Wishes, recipe: Recipe) -> list[str]:
    launch = f"torchrun --nproc-per-node {min(wishes.gpus, 8)} -m megatron_tropd"
    if wishes.gpus > 8:
        nodes = f"--nnodes {ceil_div(wishes.gpus, 8)} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
        launch = f"torchrun {nodes} --nproc-per-node 8 -m megatron_tropd"
    commands = [f"{launch} doctor {wishes.output}"]
    if recipe.guidance.responses:
        options = f"--model teacher --temperature 0 --output {recipe.guidance.responses}"
        commands.append(f"{launch} generate {wishes.output} {options}")
    return [*commands, f"{launch} train {wishes.output}", f"megatron-tropd report {recipe.logging.dir}"]


def _next_steps(wishes: Wishes, recipe: Recipe, found: Found, choice: Choice) -> str:
    hours = choice.seconds_per_step * recipe.training.steps / 3600
    warning = []
    if experts_of(found.student) is not None:
        warning = ["MoE routers train without an auxiliary loss (README, Limits)."]
    return "\n".join(
        [
            f"{wishes.output} written: {len(found.prompts):,} prompts of up to {found.prompts.longest:,} tokens; the "
            "vocabularies, and all shapes in the files of the weights, were checked.",
            f"Planned: {choice}; {hours:.2g} h for {recipe.training.steps} steps.",
            *warning,
            "Next:",
            *(f"  {command}" for command in _commands(wishes, recipe)),
        ]
    )
