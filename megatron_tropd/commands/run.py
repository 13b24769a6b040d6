"""Runs each command with its parsed arguments.

Imports that take seconds are made inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import re
import sys

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.recipe import load_recipe, shipped_recipes
from megatron_tropd.system.json_files import has_keys, refuse_foreign, refuse_unwritable, write_json
from megatron_tropd.system.launcher import launcher_rank, launcher_world_size
from megatron_tropd.validation import check_layout, require, validate


def init(arguments: argparse.Namespace) -> None:
    """Write a recipe for two models, a prompt file and a number of GPUs."""
    from megatron_tropd.commands.questions import complete
    from megatron_tropd.planning.recipe_file import check_new

    if launcher_world_size() > 1:
        raise UserError("init is one process: start it without torchrun.")
    complete(arguments)
    check_new(arguments.output, "--output")
    from megatron_tropd.commands.init_recipe import Wishes, make_recipe

    names = [field.name for field in dataclasses.fields(Wishes)]
    _print(make_recipe(Wishes(**{name: getattr(arguments, name) for name in names})))


def train(arguments: argparse.Namespace) -> None:
    """Train as the recipe says, or only print it (--dry-run)."""
    if arguments.recipe is None:
        raise UserError(f"train needs a recipe: a YAML file, or one of {', '.join(shipped_recipes())}.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    validate(recipe)
    if arguments.dry_run:
        from megatron_tropd.commands.dry_run import show

        return _print(show(recipe))
    from megatron_tropd.training.loop import train as distil

    summary = distil(recipe)
    if summary.get("nothing_to_do"):
        _print(f"finished already: {summary['steps']} steps are done in {recipe.logging.dir}; nothing to do")
        return
    skipped = [entry["reason"] for entry in summary["skipped_steps"]]
    without = f" ({len(skipped)} of them without an update: {', '.join(dict.fromkeys(skipped))})" if skipped else ""
    _print(
        f"{summary['steps']} steps{without} in {summary['seconds']:.0f} s; records and checkpoints are in "
        f"{recipe.logging.dir}"
    )
    from megatron_tropd.training.run_text import end_text

    _print(end_text(recipe, summary, sys.argv))


def _model_recipe(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe of `generate` and `evaluate`, with the model given by the options."""
    role = arguments.model
    overrides = list(arguments.overrides)
    if arguments.hf_path or arguments.checkpoint:
        overrides += [f"{role}.hf_path={arguments.hf_path or 'null'}"]
        overrides += [f"{role}.checkpoint={arguments.checkpoint or 'null'}"]
    recipe = load_recipe(arguments.recipe, overrides)
    require(recipe, f"{role}.hf_path|{role}.checkpoint")
    check_layout(role, getattr(recipe, role))
    from megatron_tropd.training.checkpoint_settings import take_settings

    take_settings(recipe, role)
    return recipe


def generate(arguments: argparse.Namespace) -> None:
    """Write a model's responses to a prompt file."""
    recipe = _model_recipe(arguments)
    recipe.data.prompts = arguments.prompts or recipe.data.prompts
    require(recipe, "data.prompts")
    from megatron_tropd.evaluation.generation import open_model, unanswered, write_responses
    from megatron_tropd.prompts.source import load_prompts
    from megatron_tropd.rollout.decoding import make_sampling

    rollout = recipe.rollout
    sampling = make_sampling(
        rollout,
        recipe.training.seed,
        samples_per_prompt=arguments.samples or 1,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )
    with open_model(recipe, arguments.model) as model:
        room = model.longest_prompt(sampling.max_new_tokens)
        remedy = "lower --max-new-tokens (default: rollout.max_new_tokens), or set data.skip_long_prompts=true"
        read = load_prompts(recipe.data.prompts, model.tokenizer, room, data=recipe.data, length_remedy=remedy)
        prompts = read[: arguments.limit]
        field = arguments.field or ("teacher_response" if model.role == "teacher" else "response")
        output, digest = arguments.output, model.digest()
        written = 0
        if unanswered(prompts, sampling, output, field, digest):  # else, or where it refuses, no weights are read
            batch = rollout.max_batch_size
            place = (model.groups, output, field)
            written = write_responses(model.engine(), prompts, sampling, *place, batch, digest, role=model.role)
    _print(f"{written} responses written to {arguments.output}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Print, and perhaps write, a model's accuracy on problems."""
    recipe = _model_recipe(arguments)
    config = recipe.evaluation
    config.problems = arguments.problems or config.problems
    require(recipe, "evaluation.problems")
    from megatron_tropd.evaluation.accuracy import describe, evaluate, load_problems
    from megatron_tropd.evaluation.generation import open_model
    from megatron_tropd.grading.grader import check_pattern

    if arguments.output:
        _refuse_output(arguments.output, "--output", "the result of an evaluation", "accuracy", "samples")
    check_pattern(config.answer_pattern)  # a pattern that does not compile is refused before the model is read
    options = {key: getattr(arguments, key) for key in ("samples", "temperature", "max_new_tokens")}
    config = dataclasses.replace(config, **{key: value for key, value in options.items() if value is not None})
    longest = config.max_new_tokens or recipe.rollout.max_new_tokens
    with open_model(recipe, arguments.model) as model:
        room = model.longest_prompt(longest)
        problems = load_problems(config.problems, model.tokenizer, room, recipe.data)[: arguments.limit]
        result = evaluate(
            model.engine(),
            problems,
            config,
            model.groups,
            rollout=recipe.rollout,
            seed=recipe.training.seed,
            role=model.role,
        )
    _print(describe(result))
    if arguments.output and launcher_rank() == 0:
        write_json(arguments.output, result)


def _refuse_output(path: str, option: str, what: str, *keys: str) -> None:
    """Refuse a file to write to before the work whose result it gets."""
    refuse_unwritable(os.path.dirname(path), f"{option} {path}")
    refuse_foreign(path, has_keys(*keys), what, option)


def hf_to_mcore(arguments: argparse.Namespace) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint."""
    from megatron_tropd.models.convert import convert_hf_to_mcore

    convert_hf_to_mcore(
        arguments.hf_path,
        arguments.output,
        verify=arguments.verify,
        bound=arguments.bound,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        expert_model_parallel_size=arguments.expert_model_parallel_size,
    )


def mcore_to_hf(arguments: argparse.Namespace) -> None:
    """Convert a Megatron checkpoint to a Hugging Face folder."""
    from megatron_tropd.models.convert import convert_mcore_to_hf

    convert_mcore_to_hf(
        arguments.checkpoint,
        arguments.output,
        dtype=arguments.dtype,
        tensor_model_parallel_size=arguments.tensor_model_parallel_size,
        pipeline_model_parallel_size=arguments.pipeline_model_parallel_size,
        expert_model_parallel_size=arguments.expert_model_parallel_size,
    )


def plan(arguments: argparse.Namespace) -> int:
    """Print memory by part, seconds by stage and layouts that fit; return 1 where the recipe's own does not fit."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    require(recipe, "student.hf_path|student.checkpoint", "teacher.hf_path|teacher.checkpoint")
    for role in ("student", "teacher"):
        check_layout(role, getattr(recipe, role))
    from megatron_tropd.planning.accelerator import Accelerator
    from megatron_tropd.planning.calibration import load_accelerator
    from megatron_tropd.planning.job import job_of
    from megatron_tropd.planning.text import describe

    if arguments.write:
        from megatron_tropd.planning.recipe_file import check_new

        check_new(arguments.write, "--write")
    gpu = load_accelerator(arguments.calibration) if arguments.calibration else Accelerator()
    if arguments.gpu_memory:
        gpu = dataclasses.replace(gpu, memory_gb=arguments.gpu_memory)

    prompt = arguments.prompt_tokens or recipe.data.max_prompt_tokens or 512
    job = job_of(recipe, arguments.gpus, prompt, gpu=gpu)
    text, fits = describe(job)
    _print(text)
    if not arguments.write:
        return 0 if fits else 1
    from megatron_tropd.planning.choice import write_choice

    _print("\n" + write_choice(job, arguments.write, arguments.recipe, arguments.overrides))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    """Check versions, devices and everything that a recipe needs; return the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for role in ("student", "teacher"):
        check_layout(role, getattr(recipe, role))
    from megatron_tropd.doctor.run import run_doctor

    if arguments.json:
        _refuse_output(arguments.json, "--json", "the checks of a doctor", "title", "checks")
    if arguments.calibrate:
        _refuse_output(arguments.calibrate, "--calibrate", "the measurements of a doctor", "flops", "bandwidth")
    return run_doctor(recipe, arguments.recipe, arguments.json, arguments.calibrate)


def data(arguments: argparse.Namespace) -> int:
    """Print what is understood of data files; return 1 where rows of them cannot be used."""
    words = [*([arguments.recipe] if arguments.recipe else []), *arguments.overrides]
    files = [word for word in words if not re.match(r"[a-z_]+(\.\w+)+=", word)]
    recipe = load_recipe(arguments.base, [word for word in words if word not in files])
    recipe.data.prompts = files or recipe.data.prompts
    require(recipe, "data.prompts")
    from megatron_tropd.prompts.data_view import describe
    from megatron_tropd.tokenizers.tokenizer import load_tokenizer
    from megatron_tropd.training.run_data import open_prompts, prompt_limit

    # transformers warns of texts beyond model_max_length, which the report measures by the recipe's own limit
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    path = arguments.tokenizer or recipe.tokenizer.path or recipe.student.hf_path
    tokenizer = load_tokenizer(path, recipe.tokenizer.chat_template) if path else None
    limit, reason = prompt_limit(recipe)
    prompts = open_prompts(recipe, tokenizer, limit)
    _print(describe(prompts, tokenizer, reason, colours=sys.stdout.isatty()))
    return 1 if prompts.problems else 0


def report(arguments: argparse.Namespace) -> None:
    """Write the HTML report of runs."""
    from megatron_tropd.reporting.report import watch, write_report

    if not arguments.watch:
        return _print(str(write_report(arguments.runs, arguments.output)))
    try:
        watch(arguments.runs, arguments.output, written=lambda page: _print(f"{page} (Ctrl-C ends the watch)"))
    except KeyboardInterrupt:  # how a watch ends
        _print("stopped watching; the page stays as it is")


def _print(text: str) -> None:
    if launcher_rank() == 0:
        print(text, flush=True)
