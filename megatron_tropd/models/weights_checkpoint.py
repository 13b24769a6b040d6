"""Weights checkpoints on disk: Megatron's files, `hf/` (config.json and tokenizer) and `complete.json`, their manifest.

save_checkpoint_weights(chunks, "runs/x/model.tmp", hf_path)    # then rename
load_checkpoint_weights(chunks, "runs/x/model", groups)         # under any TP and PP
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.errors import UserError
from megatron_tropd.mcore.compat import load_sharded, save_sharded
from megatron_tropd.models.manifest import MANIFEST, find_damage, write_manifest
from megatron_tropd.models.sharded_checks import check_stored
from megatron_tropd.parallel.groups import ParallelGroups, on_rank_zero
from megatron_tropd.tokenizers.hf_folder import GENERATION_CONFIG, TOKENIZER_FILES, copy_files

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

HF_FOLDER = "hf"
_CARRIED = ("config.json", GENERATION_CONFIG, "LICENSE*", *TOKENIZER_FILES)  # goes along with the weights
_EXTRA_STATE = re.compile(r"_extra_state\d*$")  # grouped experts number theirs: _extra_state, _extra_state1, ...


def check_checkpoint(path: str | Path, key: str = "checkpoint") -> None:
    """Raise UserError unless `path` is a whole weights checkpoint; `key` names it in the message."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{key}={path}: no such folder; make it with `megatron-tropd convert hf-to-mcore`.")
    if (path / "model" / MANIFEST).exists() and not (path / HF_FOLDER).exists():
        raise UserError(f"{key}={path} is a training checkpoint; its weights are in {path / 'model'}.")
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"{key}={path} is no whole weights checkpoint: {damage}. Convert the model again.")


def save_checkpoint_weights(
    chunks: list[GPTModel],
    directory: str | Path,
    hf_path: str | Path,
    finish_folder: Callable[[Path], None] | None = None,
    note: Callable[[Path], None] | None = None,
) -> None:
    """Write a weights checkpoint into `directory`, which is made; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        directory: not atomic by itself: write under a temporary name and rename.
        hf_path: folder whose config.json and tokenizer go along.
        finish_folder: called with the folder of their copies, on rank 0, before the list of files is made.
        note: writes more files into `directory`, likewise.
    """
    directory = Path(directory)

    def complete() -> None:
        (directory / HF_FOLDER).mkdir()
        copy_files(hf_path, directory / HF_FOLDER, _CARRIED)
        if finish_folder is not None:
            finish_folder(directory / HF_FOLDER)
        if note is not None:
            note(directory)
        write_manifest(directory)

    on_rank_zero(lambda: directory.mkdir(parents=True))
    save_sharded(sharded_weights(chunks), str(directory))  # first: Megatron warns of a folder that is not empty
    on_rank_zero(complete)


def load_checkpoint_weights(
    chunks: list[GPTModel], directory: str | Path, groups: ParallelGroups | None = None
) -> None:
    """Fill chunks from a weights checkpoint, whatever layout wrote it; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        directory: the checkpoint.
        groups: process groups of the chunks, where they are not Megatron's global ones.

    Raises:
        UserError: it is not whole, or its tensors are not the model's.
    """
    check_checkpoint(directory)
    state = sharded_weights(chunks, groups)
    check_stored(state, directory, getattr(chunks[0], "true_vocab_size", None))
    loaded = load_sharded(state, str(directory))
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        lacking = [name for name in missing if not _EXTRA_STATE.search(name)]
        assert not lacking, f"{directory} lacks {lacking}"  # Megatron's own state and parameters agree
        assert not unexpected, f"{directory} has unknown {unexpected}"


def sharded_weights(chunks: list[GPTModel], groups: ParallelGroups | None = None) -> dict[str, Any]:
    """Return Megatron's sharded state without Transformer Engine's extra states: both layer kinds then interchange."""
    metadata = None if groups is None else {"dp_cp_group": groups.dp_cp}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {
        f"model{i}": {name: tensor for name, tensor in state.items() if not _EXTRA_STATE.search(name)}
        for i, state in enumerate(states)
    }
