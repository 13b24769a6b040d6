"""Arguments of `megatron-tropd convert` and of its two directions."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import Parser, add_command, not_negative, positive


def add_convert(subcommands: Any) -> None:
    """Add `convert`."""
    parser = add_command(
        subcommands,
        "convert",
        None,
        "convert weights between Hugging Face and Megatron",
        "examples:\n"
        "  megatron-tropd convert hf-to-mcore --hf-path MODEL --output CHECKPOINT --verify\n"
        "  megatron-tropd convert mcore-to-hf --checkpoint runs/tiny/checkpoints/step_000200 --output EXPORT\n\n"
        "A checkpoint loads under every TP and PP. Each direction has its own --help.",
    )
    directions = parser.add_subparsers(dest="direction", required=True, metavar="DIRECTION")
    for parser in (_add_to_megatron(directions), _add_to_hugging_face(directions)):
        for name in ("tensor", "pipeline", "expert"):
            parser.add_argument(
                f"--{name}-model-parallel-size",
                type=positive,
                default=1,
                help="under torchrun: shard a model that is too large for one process (%(default)s)",
            )


def _add_to_megatron(directions: Any) -> Parser:
    parser = add_command(
        directions,
        "hf-to-mcore",
        commands.hf_to_mcore,
        "convert a Hugging Face folder to a Megatron checkpoint",
        "examples:\n"
        "  megatron-tropd convert hf-to-mcore --hf-path examples/tiny/teacher --output runs/teacher --verify\n"
        "  torchrun --nproc-per-node 8 -m megatron_tropd convert hf-to-mcore --tensor-model-parallel-size 8 \\\n"
        "    --hf-path MODEL --output CHECKPOINT --verify auto",
    )
    parser.add_argument("--hf-path", required=True, help="Hugging Face folder: config.json, safetensors, tokenizer")
    parser.add_argument("--output", required=True, help="checkpoint folder to write; it loads under every TP and PP")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="bits",
        choices=("auto", "bits", "all"),
        help="compare with transformers in fp32; fail on a difference. auto: the first and last layers, one of each "
        "kind, embedding and output; bits (or no value): also all tensors with the files, bit for bit; all: also "
        "every layer of the written checkpoint, which needs four bytes of memory per weight",
    )
    parser.add_argument(
        "--bound",
        type=not_negative,
        default=1e-5,
        help="largest difference that --verify accepts, relative to a layer's update or to the logits (%(default)s)",
    )
    return parser


def _add_to_hugging_face(directions: Any) -> Parser:
    parser = add_command(
        directions,
        "mcore-to-hf",
        commands.mcore_to_hf,
        "convert a Megatron checkpoint to a Hugging Face folder",
        "examples:\n"
        "  megatron-tropd convert mcore-to-hf --checkpoint runs/tiny/checkpoints/step_000200 --output EXPORT\n"
        "  megatron-tropd convert mcore-to-hf --checkpoint CHECKPOINT --output EXPORT --dtype bfloat16\n\n"
        "The folder loads in transformers and vLLM, and ends responses where training ended them.",
    )
    parser.add_argument(
        "--checkpoint", required=True, help="weights checkpoint, or a training checkpoint's model folder"
    )
    parser.add_argument("--output", required=True, help="Hugging Face folder to write")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the files (default: as stored)"
    )
    return parser
