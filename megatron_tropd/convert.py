"""Weights in and out: Hugging Face folders and Megatron distributed checkpoints that load under any TP and PP.

A weights checkpoint holds Megatron's files, `hf/` (config.json and tokenizer, so that it needs nothing else) and
`complete.json`, its manifest. Under torchrun every process holds only its own part of the model.

    convert_hf_to_mcore("models/Llama-3.1-8B", "checkpoints/llama8b", verify=True)
    convert_mcore_to_hf("runs/x/checkpoints/step_000200/model", "export/llama8b")
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_tropd.config import ModelConfig
from megatron_tropd.disk_space import check_room, folder_bytes, room_or_refusal
from megatron_tropd.hf_folder import GENERATION_CONFIG, TOKENIZER_FILES, copy_files
from megatron_tropd.hf_weights import SafetensorsFolder, load_hf_weights, save_hf_weights
from megatron_tropd.manifest import MANIFEST, find_damage, write_manifest
from megatron_tropd.megatron_compat import load_sharded, save_sharded
from megatron_tropd.model import build_model, load_hf_config
from megatron_tropd.parallel import ParallelGroups, on_rank_zero
from megatron_tropd.process_groups import process_groups
from megatron_tropd.safe_pickles import check_folder
from megatron_tropd.tokenizer import describe_check
from megatron_tropd.types import UserError
from megatron_tropd.verify import check_host_memory, logit_difference

logger = logging.getLogger(__name__)

HF_FOLDER = "hf"
_CARRIED = ("config.json", GENERATION_CONFIG, "LICENSE*", *TOKENIZER_FILES)  # goes along with the weights
_ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "tie_word_embeddings"),
)
_NO_ROOM = "make room, or give an --output on another disk"
_NOTHING_WRITTEN = "Make room, or give an --output on another disk, and start the command again."
_EXTRA_STATE = re.compile(r"_extra_state\d*$")  # grouped experts number theirs: _extra_state, _extra_state1, ...
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def resolve_hf_path(model: ModelConfig, role: str = "model") -> Path:
    """Return the folder with a model's config.json and tokenizer: `hf_path`, or the one inside `checkpoint`.

    Raises:
        UserError: a path does not exist, the checkpoint is not whole, or it is of another architecture than `hf_path`.
    """
    if model.checkpoint is not None:
        check_checkpoint(model.checkpoint, f"{role}.checkpoint")
    if model.hf_path is None:
        return Path(model.checkpoint) / HF_FOLDER
    hf_path = Path(model.hf_path)
    if not hf_path.is_dir():
        raise UserError(f"{role}.hf_path={hf_path}: no such folder; give the folder of a Hugging Face model.")
    if model.checkpoint is not None:
        _check_architecture(Path(model.checkpoint), hf_path, role)
    return hf_path


def check_checkpoint(path: str | Path, key: str = "checkpoint") -> None:
    """Raise UserError unless `path` is a whole weights checkpoint; `key` names it in the message."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{key}={path}: no such folder; make it with tools/convert_hf_to_mcore.py.")
    if (path / "model" / MANIFEST).exists() and not (path / HF_FOLDER).exists():
        raise UserError(f"{key}={path} is a training checkpoint; its weights are in {path / 'model'}.")
    damage = find_damage(path)
    if damage is not None:
        raise UserError(f"{key}={path} is no whole weights checkpoint: {damage}. Convert the model again.")


def _check_architecture(checkpoint: Path, hf_path: Path, role: str) -> None:
    ours, theirs = load_hf_config(hf_path), load_hf_config(checkpoint / HF_FOLDER)
    for key in _ARCHITECTURE:
        if getattr(ours, key) != getattr(theirs, key):
            raise UserError(
                f"{role}.checkpoint={checkpoint} is of another architecture than {role}.hf_path={hf_path}: {key} is "
                f"{getattr(theirs, key)} there and {getattr(ours, key)} here. Convert that folder, or drop hf_path."
            )


def load_model_weights(chunks: list[torch.nn.Module], model: ModelConfig, groups: ParallelGroups) -> None:
    """Fill chunks from the model's `checkpoint` if it names one, else from its `hf_path`; collective.

    Raises:
        UserError: files are missing, damaged, or of another model.
    """
    if model.checkpoint is not None:
        load_checkpoint_weights(chunks, model.checkpoint, groups)
    else:
        load_hf_weights(chunks, load_hf_config(model.hf_path), model.hf_path, groups)


def save_checkpoint_weights(
    chunks: list[torch.nn.Module],
    directory: str | Path,
    hf_path: str | Path,
    finish_folder: Callable[[Path], None] | None = None,
) -> None:
    """Write a weights checkpoint into `directory`, which is made; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        directory: not atomic by itself: write under a temporary name and rename.
        hf_path: folder whose config.json and tokenizer go along.
        finish_folder: called with their copies' folder, on rank 0, before the checkpoint is whole.
    """
    directory = Path(directory)

    def complete() -> None:
        (directory / HF_FOLDER).mkdir()
        copy_files(hf_path, directory / HF_FOLDER, _CARRIED)
        if finish_folder is not None:
            finish_folder(directory / HF_FOLDER)
        write_manifest(directory)

    on_rank_zero(lambda: directory.mkdir(parents=True))
    save_sharded(_sharded_weights(chunks), str(directory))  # first: Megatron warns of a folder that is not empty
    on_rank_zero(complete)


def load_checkpoint_weights(
    chunks: list[torch.nn.Module], directory: str | Path, groups: ParallelGroups | None = None
) -> None:
    """Fill chunks from a weights checkpoint, whatever layout wrote it; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        directory: the checkpoint.
        groups: process groups of the chunks, where they are not Megatron's global ones.

    Raises:
        UserError: it is not whole.
    """
    check_checkpoint(directory)
    loaded = load_sharded(_sharded_weights(chunks, groups), str(directory))
    for i, chunk in enumerate(chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{i}"], strict=False)
        lacking = [name for name in missing if not _EXTRA_STATE.search(name)]
        assert not lacking, f"{directory} lacks {lacking}"
        assert not unexpected, f"{directory} has unknown {unexpected}"


def _sharded_weights(chunks: list[torch.nn.Module], groups: ParallelGroups | None = None) -> dict[str, Any]:
    """Return Megatron's sharded state without Transformer Engine's extra states: both layer kinds then interchange."""
    metadata = None if groups is None else {"dp_cp_group": groups.dp_cp}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in chunks]
    return {
        f"model{i}": {name: tensor for name, tensor in state.items() if not _EXTRA_STATE.search(name)}
        for i, state in enumerate(states)
    }


def convert_hf_to_mcore(
    hf_path: str | Path,
    output: str | Path,
    verify: bool = False,
    bound: float = 1e-4,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> None:
    """Convert a Hugging Face folder to a weights checkpoint, in the dtype of its files; atomic.

    Args:
        hf_path: folder with config.json, safetensors and tokenizer.
        output: must not exist.
        verify: compare logits (fp32) with transformers' before the checkpoint gets its name.
        bound: largest absolute logit difference that `verify` lets pass.
        tensor_model_parallel_size: under torchrun, spreads a model that is too large for one process.
        pipeline_model_parallel_size: likewise.
        expert_model_parallel_size: likewise.

    Raises:
        UserError: the folder or the output cannot be used, `verify` found a larger difference, or the host has too
            little memory for it.
    """
    hf_path, output = Path(hf_path), Path(output)
    hf_config = load_hf_config(hf_path)
    _refuse_existing(output)
    with SafetensorsFolder(hf_path) as folder:
        dtype = folder.dtype()
    size = sum(file.stat().st_size for file in hf_path.glob("*.safetensors"))
    check_room(output.parent, size, f"the converted model {output}", _NO_ROOM)
    layout = ModelConfig(
        hf_path=str(hf_path),
        dtype=_dtype_name(dtype, hf_path),
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
    )
    temporary = output.with_name(f".{output.name}.tmp")
    with process_groups(layout) as groups, room_or_refusal(temporary, output, size, _NOTHING_WRITTEN):
        try:
            if verify:
                check_host_memory(hf_path, groups)
                _report(groups, describe_check(hf_path))
            chunks = build_model(hf_config, layout, groups, training=False)
            load_hf_weights(chunks, hf_config, hf_path, groups)
            on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
            save_checkpoint_weights(chunks, temporary, hf_path)
            del chunks
            if verify:
                _verify(temporary, hf_path, layout, groups, bound)
            on_rank_zero(lambda: os.rename(temporary, output))
            _report(groups, f"wrote {output} ({layout.dtype}, {hf_config.model_type})")
        except UserError:
            if groups.rank == 0:  # raised on every rank: nobody uses it any more
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def _verify(checkpoint: Path, hf_path: Path, layout: ModelConfig, groups: ParallelGroups, bound: float) -> None:
    layout = replace(layout, dtype="float32")
    # Transformer Engine would multiply in TF32, see `logit_difference`.
    chunks = build_model(load_hf_config(hf_path), layout, groups, training=False, use_transformer_engine=False)
    load_checkpoint_weights(chunks, checkpoint)
    difference = logit_difference(chunks, hf_path, groups)
    _report(groups, f"largest absolute logit difference to transformers (fp32): {difference:.3g}, bound {bound:g}")
    if not difference <= bound:
        raise UserError(
            f"{hf_path}: the converted model's logits differ from transformers' by {difference:.3g}, more than the "
            f"bound of {bound:g}; nothing was written. The architecture has a part that this conversion does not know."
        )


def convert_mcore_to_hf(
    checkpoint: str | Path,
    output: str | Path,
    dtype: str | None = None,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> None:
    """Export a weights checkpoint to a Hugging Face folder that `transformers` loads; atomic.

    Args:
        checkpoint: weights checkpoint, or a training checkpoint, whose `model/` is taken.
        output: must not exist.
        dtype: of the files, by name; default: as stored, so that a conversion there and back is bit-identical.
        tensor_model_parallel_size: under torchrun, spreads a model that is too large for one process.
        pipeline_model_parallel_size: likewise.
        expert_model_parallel_size: likewise.

    Raises:
        UserError: the checkpoint is not whole, or the output exists.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    if (checkpoint / "model" / MANIFEST).exists():
        checkpoint = checkpoint / "model"
    check_checkpoint(checkpoint)
    _refuse_existing(output)
    hf_config = load_hf_config(checkpoint / HF_FOLDER)
    stored = _DTYPE_NAMES[stored_dtype(checkpoint)]
    layout = ModelConfig(
        dtype=stored,
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
    )
    temporary = output.with_name(f".{output.name}.tmp")
    size = folder_bytes(checkpoint)
    check_room(output.parent, size, f"the exported model {output}", _NO_ROOM)
    with process_groups(layout) as groups, room_or_refusal(temporary, output, size, _NOTHING_WRITTEN):
        chunks = build_model(hf_config, layout, groups, training=False)
        load_checkpoint_weights(chunks, checkpoint)

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(checkpoint / HF_FOLDER, temporary)
            _set_dtype(temporary / "config.json", dtype or stored)

        on_rank_zero(prepare)
        save_hf_weights(chunks, hf_config, temporary, groups, None if dtype is None else getattr(torch, dtype))
        on_rank_zero(lambda: os.rename(temporary, output))
        _report(groups, f"wrote {output} ({dtype or stored}, {hf_config.model_type})")


def stored_dtype(checkpoint: str | Path) -> torch.dtype:
    """Return the dtype of a checkpoint's weights."""
    check_folder(checkpoint)
    tensors = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    return next(iter(tensors.values())).dtype


def _dtype_name(dtype: torch.dtype, hf_path: Path) -> str:
    if dtype not in _DTYPE_NAMES:
        raise UserError(
            f"{hf_path} holds weights of {dtype}; expected {', '.join(_DTYPE_NAMES.values())}. Dequantise the model "
            "with transformers and save it first."
        )
    return _DTYPE_NAMES[dtype]


def _set_dtype(config_file: Path, dtype: str) -> None:
    config = json.loads(config_file.read_text())
    for key in ("dtype", "torch_dtype"):  # the second is its name before transformers 5
        if key in config or key == "dtype":
            config[key] = dtype
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def _refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists already; remove it or give another folder.")


def _report(groups: ParallelGroups, text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
