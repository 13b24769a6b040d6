"""Arguments of `megatron-tropd plan`."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import above_zero, add_command, add_recipe_arguments, positive


def add_plan(subcommands: Any) -> None:
    """Add `plan`."""
    parser = add_command(
        subcommands,
        "plan",
        commands.plan,
        "estimate memory per GPU by part and seconds per step, and propose layouts that fit",
        "examples:\n"
        "  megatron-tropd plan llama_70b_to_8b teacher.hf_path=70B student.hf_path=8B --gpus 8 --gpu-memory 80\n"
        "  megatron-tropd plan recipe.yaml --gpus 16 --write recipe_16.yaml  # the fastest layout, as a recipe\n\n"
        "It reads only the config.json of each model. The exit status is 0 if the recipe's layout fits, 1 if it does\n"
        "not, 2 if the input is wrong. Every response is assumed to reach rollout.max_new_tokens. Times are\n"
        "calculated for H100s unless --calibration gives measurements of your GPUs.",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="write a new recipe that starts from this one and has the fastest layout that fits; status 2 if none does",
    )
    parser.add_argument("--gpus", type=positive, default=8, help="number of GPUs (%(default)s)")
    parser.add_argument(
        "--gpu-memory", type=above_zero, metavar="GB", help="memory per GPU (default: the calibration file's, or 80)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="file that `megatron-tropd doctor --calibrate FILE` wrote on your GPUs"
    )
    parser.add_argument(
        "--prompt-tokens", type=positive, help="longest prompt (default: the recipe's data.max_prompt_tokens, or 512)"
    )
