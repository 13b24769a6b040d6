"""Arguments of the commands that run models: doctor, train, generate, evaluate and chat."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import (
    Parser,
    add_command,
    add_recipe_arguments,
    not_negative,
    positive,
    whole,
)
from megatron_tropd.commands.chat import chat


def add_doctor(subcommands: Any) -> None:
    """Add `doctor`."""
    parser = add_command(
        subcommands,
        "doctor",
        commands.doctor,
        "check the installation, and everything a recipe needs on these devices",
        "examples:\n"
        "  megatron-tropd doctor\n"
        "  megatron-tropd doctor tiny\n"
        "  torchrun --nproc-per-node 8 -m megatron_tropd doctor llama_70b_to_8b --json doctor.json\n\n"
        "Run it first on a new machine or cluster, launched as the training will be. It reads no model, but uses\n"
        "small random models with the recipe's dtype, objective and layout; the layout is reduced to the available\n"
        "processes. Each check prints one line: ok, slow, missing (not installed) or wrong, with a remedy. The exit\n"
        "status is 1 if something that the recipe needs is missing or wrong, 2 if the recipe itself is wrong.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write all checks and measurements to this file")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="measure the devices for `plan --calibration`, and write this file"
    )


def add_train(subcommands: Any) -> None:
    """Add `train`."""
    parser = add_command(
        subcommands,
        "train",
        commands.train,
        "distil the teacher into the student of a recipe",
        "examples:\n"
        "  megatron-tropd train tiny --dry-run  # check; show what differs from the defaults\n"
        "  torchrun --nproc-per-node 2 -m megatron_tropd train tiny training.steps=10 logging.dir=runs/short\n"
        "  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\\n"
        "    -m megatron_tropd train recipe.yaml\n"
        "  megatron-tropd train --help-keys objective  # the objectives, and when to use which\n\n"
        "A killed run continues when the same command is given again. Ctrl-C and SIGTERM save a checkpoint after the\n"
        "current step and end with status 0; a second Ctrl-C ends at once with 130. The folder logging.dir holds\n"
        "run.json, recipe.yaml, recipes.jsonl, metrics.jsonl, evaluations.jsonl, answers.jsonl, samples.jsonl,\n"
        "summary.json, tensorboard/ and checkpoints/; `megatron-tropd report` turns it into a page.",
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check and print the resolved recipe, what differs from the defaults, and the plan, and stop",
    )


def _add_model_arguments(parser: Parser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument(
        "--model", choices=("student", "teacher"), default="student", help="which model of the recipe (%(default)s)"
    )
    parser.add_argument("--hf-path", help="Hugging Face folder of the model, instead of the recipe's")
    parser.add_argument("--checkpoint", help="Megatron checkpoint of the weights, instead of the recipe's")
    parser.add_argument("--max-new-tokens", type=positive, help="longest response, in tokens")
    parser.add_argument("--temperature", type=not_negative, help="sampling temperature; 0 is greedy")
    parser.add_argument(
        "--samples", type=positive, help="responses per prompt (generate: 1; evaluate: evaluation.samples)"
    )
    parser.add_argument("--limit", type=positive, help="use only the first LIMIT prompts")


def add_generate(subcommands: Any) -> None:
    """Add `generate`."""
    parser = add_command(
        subcommands,
        "generate",
        commands.generate,
        "write a model's responses to prompts as JSONL",
        "examples:\n"
        "  megatron-tropd generate --hf-path examples/tiny/teacher --prompts examples/tiny/prompts.jsonl \\\n"
        "    --output runs/responses.jsonl --max-new-tokens 64 student.dtype=float32\n"
        "  torchrun --nproc-per-node 2 -m megatron_tropd generate tiny --model teacher --temperature 0 \\\n"
        "    --output runs/teacher.jsonl  # for guidance.responses and seqkd\n\n"
        "Prompts whose responses are already in the output are skipped, so the same command completes a killed run.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--prompts", help="file of prompts (default: the recipe's data.prompts)")
    parser.add_argument("--output", required=True, help="JSONL file to write or to complete")
    parser.add_argument(
        "--field", help="name of the response field (default: response; of the teacher: teacher_response)"
    )


def add_evaluate(subcommands: Any) -> None:
    """Add `evaluate`."""
    parser = add_command(
        subcommands,
        "evaluate",
        commands.evaluate,
        "measure a model's accuracy on problems with verifiable answers",
        "examples:\n"
        "  megatron-tropd evaluate tiny --model teacher --output runs/teacher.json\n"
        "  megatron-tropd evaluate --hf-path MODEL --problems problems.jsonl --samples 32 --temperature 1.0\n\n"
        'A problem is a row {"text" or "messages", "answer", optionally "id"}. The answer of a response is its last\n'
        "\\boxed{...}, else the text after ####, else after 'answer is', else its last number, or what your own regex\n"
        "finds (evaluation.answer_pattern); evaluation.grader compares it: math, multiple_choice or exact.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--problems", help="file of problems (default: the recipe's evaluation.problems)")
    parser.add_argument("--output", help="JSON file for the result and all responses")


def add_chat(subcommands: Any) -> None:
    """Add `chat`."""
    parser = add_command(
        subcommands,
        "chat",
        chat,
        "talk with a model on the terminal",
        "examples:\n"
        "  megatron-tropd chat runs/tiny  # the newest checkpoint of a run\n"
        "  megatron-tropd chat runs/tiny --step 100 --temperature 0\n"
        "  megatron-tropd chat examples/tiny/teacher student.dtype=float32 --max-new-tokens 64\n"
        "  torchrun --nproc-per-node 2 -m megatron_tropd chat MODEL student.tensor_model_parallel_size=2\n\n"
        "Messages go through the tokenizer's chat template, with all that was said before. /reset forgets it, /step N\n"
        "goes on with another checkpoint of the run, /quit, Ctrl-D and Ctrl-C end (torchrun reports Ctrl-C as its\n"
        "failure: use /quit there). A run's recipe says how tokens are drawn and what ends a reply; without torchrun,\n"
        "the layout is one process. Lines may also come from a pipe: the reply to each goes to standard output, notes\n"
        "and numbers to standard error.",
    )
    what = "a run's folder, a Megatron checkpoint or a Hugging Face folder; then recipe keys"
    add_recipe_arguments(parser, "MODEL", what)
    parser.add_argument(
        "--step", type=whole, help="the run's checkpoint after this step (default: the newest whole one)"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning of the conversation")
    parser.add_argument("--max-new-tokens", type=positive, help="longest reply, in tokens (rollout.max_new_tokens)")
    parser.add_argument(
        "--temperature", type=not_negative, help="sampling temperature; 0 is greedy (rollout.temperature)"
    )
    parser.add_argument(
        "--seed", type=whole, help="of the sampling; the same seed gives the same replies (training.seed)"
    )
