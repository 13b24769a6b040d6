"""Arguments of `megatron-tropd data`."""

from __future__ import annotations

from typing import Any

from megatron_tropd.commands import run as commands
from megatron_tropd.commands.arguments import add_command, add_help_keys


def add_data(subcommands: Any) -> None:
    """Add `data`: files and overrides, which may stand in any order, and options."""
    parser = add_command(
        subcommands,
        "data",
        commands.data,
        "show how data files are read, and their problems",
        "examples:\n"
        "  megatron-tropd data examples/tiny/prompts.jsonl --tokenizer examples/tiny/student\n"
        "  megatron-tropd data train.parquet data.columns.prompt=question data.max_prompt_tokens=512 \\\n"
        "    student.hf_path=examples/tiny/student\n\n"
        "It reads JSONL, JSON, CSV, TSV (also .gz), Parquet, Arrow and save_to_disk folders, and shows format, rows,\n"
        "columns by role, three prompts as the model receives them, token lengths, duplicates and the first ten\n"
        "problems by row. The exit status is 0 if every row can be used, 1 if some cannot, 2 if a file cannot be read.",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FILE | key=value",
        help="data files or patterns (default: the recipe's data.prompts); recipe keys (data.columns.prompt=text)",
    )
    parser.add_argument("--recipe", dest="base", help="recipe from which data.*, tokenizer.* and student.* are read")
    parser.add_argument("--tokenizer", help="folder or .model file (default: tokenizer.path, else student.hf_path)")
    parser.set_defaults(recipe=None)
    add_help_keys(parser)
