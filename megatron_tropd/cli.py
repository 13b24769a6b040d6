"""The command line `megatron-tropd`: doctor | train | generate | evaluate | data | convert | plan | report.

Under torchrun every rank runs it (`torchrun --nproc-per-node 2 -m megatron_tropd train tiny`); without torchrun it is
one process. A UserError is printed once and ends every rank with status 2. An error on a single rank ends that rank at
once, so that the launcher ends the others. commands.py implements the commands.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from typing import Any

from megatron_tropd import commands
from megatron_tropd.cli_data import add_data_arguments
from megatron_tropd.errors import UserError

_RECIPE_HELP = "YAML file, or the name of a shipped recipe"
_OVERRIDES_HELP = "recipe keys, such as training.steps=10; `megatron-tropd train --help-keys` lists all"
# Warnings of Megatron-Core and PyTorch about each other and about optional parts, which a user cannot fix.
_EXPECTED_WARNINGS = (
    ".*Apex (is|are) not installed",
    r".*torch\.distributed\..* is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    "`load_state_dict` is deprecated",
    "Please use DTensor instead",
)
_GRACE_SECONDS = 5.0  # rank 0 prints first; see _fail


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 failure or a plan that does not fit, 2 bad input."""
    arguments = _parse(argv)
    _configure_logging()
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        return _fail(f"megatron-tropd: error: {error}", 2)
    except KeyboardInterrupt:
        return _fail("megatron-tropd: interrupted", 130)
    except SystemExit as error:
        if not error.code:
            return 0
        message, status = (error.code, 1) if isinstance(error.code, str) else ("megatron-tropd: ended", error.code)
        return _fail(message, status)
    except BaseException:  # torch's CheckpointException and others are no Exception
        return _fail(traceback.format_exc().rstrip(), 1)


def _fail(message: str, status: int) -> int:
    """Print once over all ranks and leave, without waiting for ranks that may wait for this one."""
    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if rank > 0:
        # Nearly always rank 0 stumbles over the same thing, prints it, and the launcher ends this rank while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_GRACE_SECONDS)
        message = f"[rank {rank}] {message}"
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if world_size > 1:
        os._exit(status)  # an orderly exit would tear down process groups, which waits for the other ranks
    return status


def _configure_logging() -> None:
    rank = int(os.environ.get("RANK", 0))
    logging.basicConfig(format="%(message)s", level=logging.WARNING if rank == 0 else logging.ERROR)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("megatron_tropd").setLevel(logging.INFO if rank == 0 else logging.ERROR)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse; overrides may stand before, between and after options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(arguments, "overrides")]
    if unknown:
        parser.error(
            f"unknown argument {unknown[0]!r}; `megatron-tropd {arguments.command} --help` lists what there is"
        )
    if rest:
        arguments.overrides += rest
    if hasattr(arguments, "overrides") and arguments.overrides and "=" not in arguments.overrides[0]:
        arguments.recipe = arguments.overrides.pop(0)
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-tropd",
        description="Trust Region On-Policy Distillation (TrOPD) on Megatron-Core.",
        epilog="Each command has its own --help. On several devices: torchrun --nproc-per-node N -m megatron_tropd ...",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_doctor(subcommands)
    _add_train(subcommands)
    _add_generate(subcommands)
    _add_evaluate(subcommands)
    add_data_arguments(_command(subcommands, "data", commands.data, "show how data files are read, and their problems"))
    _add_convert(subcommands)
    _add_plan(subcommands)
    _add_report(subcommands)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("megatron-tropd")
    except PackageNotFoundError:
        return "(not installed)"


def _command(subcommands: Any, name: str, run: Any, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    parser = subcommands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="[RECIPE] key=value", help=f"{_RECIPE_HELP}; {_OVERRIDES_HELP}")
    parser.set_defaults(recipe=None)


def _add_doctor(subcommands: Any) -> None:
    parser = _command(
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
    _add_recipe_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write all checks and measurements to this file")
    parser.add_argument(
        "--calibrate", metavar="FILE", help="measure the devices for `plan --calibration`, and write this file"
    )


def _add_train(subcommands: Any) -> None:
    parser = _command(
        subcommands,
        "train",
        commands.train,
        "distil the teacher into the student of a recipe",
        "examples:\n"
        "  megatron-tropd train tiny --dry-run\n"
        "  torchrun --nproc-per-node 2 -m megatron_tropd train tiny training.steps=10 logging.dir=runs/short\n\n"
        "A killed run continues when the same command is given again. The run's folder (logging.dir) holds\n"
        "run.json, recipe.yaml, recipes.jsonl, metrics.jsonl, evaluations.jsonl, answers.jsonl, samples.jsonl,\n"
        "summary.json, tensorboard/ and checkpoints/; `megatron-tropd report` turns it into a page.",
    )
    _add_recipe_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="check and print the resolved recipe, and stop")
    parser.add_argument(
        "--help-keys", action=_HelpKeys, nargs=0, help="list every recipe key with its default and stop"
    )


class _HelpKeys(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from megatron_tropd.recipe import describe

        print(describe())
        parser.exit()


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    _add_recipe_arguments(parser)
    parser.add_argument(
        "--model", choices=("student", "teacher"), default="student", help="which model of the recipe (%(default)s)"
    )
    parser.add_argument("--hf-path", help="Hugging Face folder of the model, instead of the recipe's")
    parser.add_argument("--checkpoint", help="Megatron checkpoint of the weights, instead of the recipe's")
    parser.add_argument("--max-new-tokens", type=_positive, help="longest response, in tokens")
    parser.add_argument("--temperature", type=_not_negative, help="sampling temperature; 0 is greedy")
    parser.add_argument(
        "--samples", type=_positive, help="responses per prompt (generate: 1; evaluate: evaluation.samples)"
    )
    parser.add_argument("--limit", type=_positive, help="use only the first LIMIT prompts")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of at least 0")
    return value


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def _add_generate(subcommands: Any) -> None:
    parser = _command(
        subcommands,
        "generate",
        commands.generate,
        "write a model's responses to prompts as JSONL",
        "example:\n"
        "  megatron-tropd generate --hf-path examples/tiny/teacher --prompts examples/tiny/prompts.jsonl \\\n"
        "    --output runs/responses.jsonl --max-new-tokens 64 student.dtype=float32\n\n"
        "Prompts whose responses are already in the output are skipped, so the same command completes a killed run.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--prompts", help="file of prompts (default: the recipe's data.prompts)")
    parser.add_argument("--output", required=True, help="JSONL file to write or to complete")
    parser.add_argument("--field", default="response", help="name of the response field (%(default)s)")


def _add_evaluate(subcommands: Any) -> None:
    parser = _command(
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


def _add_convert(subcommands: Any) -> None:
    parser = _command(subcommands, "convert", None, "convert weights between Hugging Face and Megatron")
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    there = _command(
        directions, "hf-to-mcore", commands.hf_to_mcore, "convert a Hugging Face folder to a Megatron checkpoint"
    )
    there.add_argument("--hf-path", required=True, help="Hugging Face folder: config.json, safetensors, tokenizer")
    there.add_argument("--output", required=True, help="checkpoint folder to write; it loads under every TP and PP")
    there.add_argument(
        "--verify",
        nargs="?",
        const="bits",
        choices=("auto", "bits", "all"),
        help="compare with transformers in fp32; fail on a difference. auto: the first and last layers, one of each "
        "kind, embedding and output; bits (or no value): also all tensors with the files, bit for bit; all: also "
        "every layer of the written checkpoint, which needs four bytes of memory per weight",
    )
    there.add_argument(
        "--bound",
        type=_not_negative,
        default=1e-5,
        help="largest difference that --verify accepts, relative to a layer's update or to the logits (%(default)s)",
    )
    back = _command(
        directions, "mcore-to-hf", commands.mcore_to_hf, "convert a Megatron checkpoint to a Hugging Face folder"
    )
    back.add_argument("--checkpoint", required=True, help="weights checkpoint, or a training checkpoint's model folder")
    back.add_argument("--output", required=True, help="Hugging Face folder to write")
    back.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the files (default: as stored)"
    )
    for parser in (there, back):
        for name in ("tensor", "pipeline", "expert"):
            parser.add_argument(
                f"--{name}-model-parallel-size",
                type=_positive,
                default=1,
                help="under torchrun: shard a model that is too large for one process (%(default)s)",
            )


def _add_plan(subcommands: Any) -> None:
    parser = _command(
        subcommands,
        "plan",
        commands.plan,
        "estimate memory per GPU by part and seconds per step, and propose layouts that fit",
        "examples:\n"
        "  megatron-tropd plan llama_70b_to_8b teacher.hf_path=70B student.hf_path=8B --gpus 8 --gpu-memory 80\n\n"
        "It reads only the config.json of each model. The exit status is 0 if the recipe's layout fits, 1 if it does\n"
        "not, 2 if the input is wrong. Every response is assumed to reach rollout.max_new_tokens. Times are\n"
        "calculated for H100s unless --calibration gives measurements of your GPUs.",
    )
    _add_recipe_arguments(parser)
    parser.add_argument("--gpus", type=_positive, default=8, help="number of GPUs (%(default)s)")
    parser.add_argument(
        "--gpu-memory", type=_above_zero, metavar="GB", help="memory per GPU (default: the calibration file's, or 80)"
    )
    parser.add_argument(
        "--calibration", metavar="FILE", help="file that `megatron-tropd doctor --calibrate FILE` wrote on your GPUs"
    )
    parser.add_argument(
        "--prompt-tokens", type=_positive, help="longest prompt (default: the recipe's data.max_prompt_tokens, or 512)"
    )


def _add_report(subcommands: Any) -> None:
    parser = _command(
        subcommands,
        "report",
        commands.report,
        "write one interactive HTML page about a run, or a comparison of several runs",
        "examples:\n"
        "  megatron-tropd report runs/tiny\n"
        "  megatron-tropd report runs/tropd runs/opd --output runs/comparison\n"
        "  megatron-tropd report runs/tiny --watch\n\n"
        "The page (report.html) is self-contained and needs no network. It shows curves, the trust region over time,\n"
        "responses with every token coloured, answers before and after training, and the recipe.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder (the recipe's logging.dir)")
    parser.add_argument(
        "--output", help="folder to write to (default: the run's folder; for several runs, `comparison` beside them)"
    )
    parser.add_argument(
        "--watch", action="store_true", help="update the page during training, until all runs have finished"
    )


if __name__ == "__main__":
    sys.exit(main())
