"""Arguments of `megatron-tropd init`."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import above_zero, add_command, positive
from megatron_tropd.methods import METHODS


def add_init(subcommands: Any) -> None:
    """Add `init`."""
    parser = add_command(
        subcommands,
        "init",
        commands.init,
        "write a commented recipe for your models, prompts and GPUs",
        "examples:\n"
        "  megatron-tropd init  # asks for what is missing\n"
        "  megatron-tropd init --teacher models/Qwen3-32B --student models/Qwen3-1.7B --prompts prompts.jsonl \\\n"
        "    --problems problems.jsonl --gpus 8\n"
        "  megatron-tropd init --teacher examples/tiny/teacher --student examples/tiny/student \\\n"
        "    --prompts examples/tiny/prompts.jsonl --gpus 2 --dtype float32 --output runs/mine.yaml\n\n"
        "It reads config.json, tokenizer, the names and shapes of the weights, and the prompts;\n"
        "it takes the layout that the planner finds fastest among those that fit, and prints the commands to run.\n"
        "Everything else in the recipe is the paper's; `--help-keys` of any other command explains every key.",
    )
    parser.add_argument("--teacher", metavar="DIR", help="Hugging Face folder of the teacher")
    parser.add_argument("--student", metavar="DIR", help="Hugging Face folder of the student")
    parser.add_argument("--prompts", metavar="FILE", help="prompts: JSONL, JSON, CSV, Parquet or Arrow, or a pattern")
    parser.add_argument("--problems", metavar="FILE", help="problems with answers, on which accuracy is measured")
    parser.add_argument("--gpus", type=positive, metavar="N", help="number of GPUs, or of processes on a CPU")
    parser.add_argument("--gpu-memory", type=above_zero, metavar="GB", help="memory per GPU (default: 80)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="bfloat16",
        help="of both models (%(default)s; auto: on a CPU the faster of bfloat16 and float32, which `train` measures)",
    )
    names = [name for name, method in METHODS.items() if not method.data]
    parser.add_argument("--method", choices=names, default="tropd", help="objective.name (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="recipe to write (default: recipe.yaml); it must not exist")
