"""What each command of the command line does, over parsed arguments.

Imports that take seconds are made inside the command that needs them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.json_files import write_json
from megatron_tropd.recipe import load_recipe, shipped_recipes, to_yaml
from megatron_tropd.validation import check_layout, require, validate


def train(arguments: argparse.Namespace) -> None:
    """Train as the recipe says, or only print it (--dry-run)."""
    if arguments.recipe is None:
        raise UserError(f"train needs a recipe: a YAML file, or one of {', '.join(shipped_recipes())}.")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    validate(recipe)
    if arguments.dry_run:
        from megatron_tropd.objectives import build_objective

        build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
        _print(to_yaml(recipe).rstrip())
        return
    from megatron_tropd.train import train as distil

    summary = distil(recipe)
    _print(
        f"{summary['steps']} steps in {summary['seconds']:.0f} s; records and checkpoints are in {recipe.logging.dir}"
    )
    for record in summary["evaluations"]:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in record.items() if key != "step")
        _print(f"  after {record['step']} steps: {numbers}")


def _model_recipe(arguments: argparse.Namespace) -> Recipe:
    """Read the recipe of `generate` and `evaluate`, with the options' model in the place of its own."""
    role = arguments.model
    overrides = list(arguments.overrides)
    if arguments.hf_path or arguments.checkpoint:
        overrides += [f"{role}.hf_path={arguments.hf_path or 'null'}"]
        overrides += [f"{role}.checkpoint={arguments.checkpoint or 'null'}"]
    recipe = load_recipe(arguments.recipe, overrides)
    require(recipe, f"{role}.hf_path|{role}.checkpoint")
    check_layout(role, getattr(recipe, role))
    return recipe


def generate(arguments: argparse.Namespace) -> None:
    """Write a model's responses to a prompt file."""
    recipe = _model_recipe(arguments)
    recipe.data.prompts = arguments.prompts or recipe.data.prompts
    require(recipe, "data.prompts")
    from megatron_tropd.generation import open_model, write_responses
    from megatron_tropd.prompts import load_prompts
    from megatron_tropd.types import Sampling

    rollout = recipe.rollout
    sampling = Sampling(
        samples_per_prompt=arguments.samples or 1,
        max_new_tokens=arguments.max_new_tokens or rollout.max_new_tokens,
        temperature=rollout.temperature if arguments.temperature is None else arguments.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        stop=tuple(rollout.stop),
        seed=recipe.training.seed,
    )
    with open_model(recipe, arguments.model) as model:
        prompts = load_prompts(recipe.data.prompts, model.tokenizer, model.longest_prompt(sampling.max_new_tokens))
        prompts = prompts[: arguments.limit]
        written = write_responses(
            model.engine(), prompts, sampling, model.groups, arguments.output, arguments.field, rollout.max_batch_size
        )
    _print(f"{written} responses written to {arguments.output}")


def evaluate(arguments: argparse.Namespace) -> None:
    """Print, and perhaps write, a model's accuracy on problems."""
    recipe = _model_recipe(arguments)
    config = recipe.evaluation
    config.problems = arguments.problems or config.problems
    require(recipe, "evaluation.problems")
    from megatron_tropd.evaluation import evaluate, extract_answer, load_problems
    from megatron_tropd.generation import open_model

    extract_answer("", config.answer_pattern)  # a pattern that does not compile is refused before the model is read
    options = {key: getattr(arguments, key) for key in ("samples", "temperature", "max_new_tokens")}
    config = dataclasses.replace(config, **{key: value for key, value in options.items() if value is not None})
    longest = config.max_new_tokens or recipe.rollout.max_new_tokens
    with open_model(recipe, arguments.model) as model:
        problems = load_problems(config.problems, model.tokenizer, model.longest_prompt(longest))[: arguments.limit]
        result = evaluate(
            model.engine(),
            problems,
            config,
            model.groups,
            max_new_tokens=longest,
            batch_size=recipe.rollout.max_batch_size,
            seed=recipe.training.seed,
        )
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result["finish_reasons"].items()))
    _print(f"accuracy {result['accuracy']:.4f} ({result['correct']} of {result['total']} responses right)")
    _print(f"mean response length {result['mean_response_length']:.1f} tokens; finished by: {reasons}")
    if arguments.output and int(os.environ.get("RANK", 0)) == 0:
        write_json(arguments.output, result)


def hf_to_mcore(arguments: argparse.Namespace) -> None:
    """Convert a Hugging Face folder to a Megatron checkpoint."""
    from megatron_tropd.convert import convert_hf_to_mcore

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
    from megatron_tropd.convert import convert_mcore_to_hf

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
    from megatron_tropd.convert import resolve_hf_path
    from megatron_tropd.model import load_hf_config
    from megatron_tropd.plan_accelerator import Accelerator
    from megatron_tropd.plan_calibration import load_accelerator
    from megatron_tropd.plan_job import Job
    from megatron_tropd.plan_text import describe

    gpu = load_accelerator(arguments.calibration) if arguments.calibration else Accelerator()
    if arguments.gpu_memory:
        gpu = dataclasses.replace(gpu, memory_gb=arguments.gpu_memory)

    configs = [load_hf_config(resolve_hf_path(getattr(recipe, role), role)) for role in ("student", "teacher")]
    prompt = arguments.prompt_tokens or recipe.data.max_prompt_tokens or 512
    text, fits = describe(Job(*configs, recipe, arguments.gpus, prompt, gpu=gpu))
    _print(text)
    return 0 if fits else 1


def doctor(arguments: argparse.Namespace) -> int:
    """Check versions, devices and everything that a recipe needs; return the exit status."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    for role in ("student", "teacher"):
        check_layout(role, getattr(recipe, role))
    from megatron_tropd.doctor import run_doctor

    return run_doctor(recipe, arguments.recipe, arguments.json, arguments.calibrate)


def report(arguments: argparse.Namespace) -> None:
    """Write the HTML report of runs."""
    from megatron_tropd.report import watch, write_report

    if not arguments.watch:
        return _print(str(write_report(arguments.runs, arguments.output)))
    try:
        watch(arguments.runs, arguments.output, written=lambda page: _print(f"{page} (Ctrl-C ends the watch)"))
    except KeyboardInterrupt:  # how a watch ends
        _print("stopped watching; the page stays as it is")


def _print(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)
