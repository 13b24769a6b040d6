"""Converts weights between Hugging Face folders and Megatron distributed checkpoints that load under any TP and PP.

A weights checkpoint holds Megatron's files, `hf/` (config.json and tokenizer, so that it needs nothing else) and
`complete.json`, its manifest. Under torchrun every process holds only its own part of the model.

    convert_hf_to_mcore("models/Llama-3.1-8B", "checkpoints/llama8b", verify=True)
    convert_mcore_to_hf("runs/x/checkpoints/step_000200/model", "export/llama8b")
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.huggingface.checks import check_files, check_tensors
from megatron_tropd.huggingface.compare import difference
from megatron_tropd.huggingface.config import load_hf_config, portable_config, read_config
from megatron_tropd.huggingface.files import SafetensorsFolder
from megatron_tropd.huggingface.tensor_dtypes import (
    DTYPE_NAMES,
    dtype_of,
    read_record,
    set_dtype,
    widest_by_kind,
    write_record,
)
from megatron_tropd.models.build import build_model
from megatron_tropd.models.hf_weights import find_difference, load_hf_weights, named_parameters, save_hf_weights
from megatron_tropd.models.manifest import MANIFEST
from megatron_tropd.models.sharded_checks import common_dtype, stored_tensors, take_stored_dtypes
from megatron_tropd.models.verify import BOUND, verify_model
from megatron_tropd.models.weights_checkpoint import (
    HF_FOLDER,
    check_checkpoint,
    load_checkpoint_weights,
    save_checkpoint_weights,
    sharded_weights,
)
from megatron_tropd.numbers.finite_weights import check_finite
from megatron_tropd.parallel.groups import ParallelGroups, on_rank_zero
from megatron_tropd.parallel.process_groups import process_groups
from megatron_tropd.system.disk_space import check_room, folder_bytes, room_or_refusal
from megatron_tropd.tokenizers.hf_folder import copy_files
from megatron_tropd.tokenizers.tokenizer import describe_check
from megatron_tropd.types import UserError

logger = logging.getLogger(__name__)

_NO_ROOM = "make room, or give an --output on another disk"
_NOTHING_WRITTEN = "Make room, or give an --output on another disk, and start the command again."


def resolve_hf_path(model: ModelConfig, role: str = "model") -> Path:
    """Return the folder with a model's config.json and tokenizer: `hf_path`, or the one inside `checkpoint`.

    Raises:
        UserError: a path does not exist, the checkpoint is not whole, or it is of another architecture than `hf_path`.
    """
    if model.checkpoint is not None:
        check_checkpoint(model.checkpoint, f"{role}.checkpoint")
    if model.hf_path is None:
        assert model.checkpoint is not None  # a recipe without either is refused before
        return Path(model.checkpoint) / HF_FOLDER
    hf_path = Path(model.hf_path)
    if not hf_path.is_dir():
        raise UserError(f"{role}.hf_path={hf_path}: no such folder; give the folder of a Hugging Face model.")
    if model.checkpoint is not None:
        _check_architecture(Path(model.checkpoint), hf_path, role)
    return hf_path


def _check_architecture(checkpoint: Path, hf_path: Path, role: str) -> None:
    found = difference(load_hf_config(hf_path), load_hf_config(checkpoint / HF_FOLDER))
    if found is not None:
        key, here, there = found
        raise UserError(
            f"{role}.checkpoint={checkpoint} is of another model than {role}.hf_path={hf_path}: {key} is {there} there "
            f"and {here} here. Convert that folder, or drop hf_path."
        )


def check_model_files(model: ModelConfig) -> None:
    """Refuse weights of `hf_path` that its config.json does not describe, by their headers: before anything is built.

    Raises:
        UserError: names, shapes or kinds of numbers do not fit.
    """
    if model.checkpoint is None:
        assert model.hf_path is not None  # a recipe without either is refused before
        check_files(model.hf_path, load_hf_config(model.hf_path))


def load_model_weights(chunks: list[torch.nn.Module], model: ModelConfig, groups: ParallelGroups) -> None:
    """Fill chunks from the model's `checkpoint` if it names one, else from its `hf_path`; collective.

    Raises:
        UserError: files are missing, damaged, or of another model.
    """
    if model.checkpoint is not None:
        load_checkpoint_weights(chunks, model.checkpoint, groups)
    else:
        assert model.hf_path is not None  # a recipe without either is refused before
        load_hf_weights(chunks, load_hf_config(model.hf_path), model.hf_path, groups)


def convert_hf_to_mcore(
    hf_path: str | Path,
    output: str | Path,
    verify: bool | str = False,
    bound: float = BOUND,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
) -> None:
    """Convert a Hugging Face folder to a weights checkpoint, each tensor in the dtype of its files; atomic.

    Args:
        hf_path: folder with config.json, safetensors and tokenizer.
        output: must not exist.
        verify: before the checkpoint gets its name, compare with transformers, in fp32. "auto": a few layers and the
            output. "bits", or True: also the bits of all its tensors with the files'. "all": also every layer of the
            checkpoint with transformers' of the folder, which takes the whole model in fp32.
        bound: largest relative difference of a layer's results or of the logits that `verify` lets pass.
        tensor_model_parallel_size: under torchrun, spreads a model that is too large for one process.
        pipeline_model_parallel_size: likewise.
        expert_model_parallel_size: likewise.

    Raises:
        UserError: the folder or the output cannot be used, its tensors are not those of its config, `verify` found a
            larger difference, or the host has too little memory for it.
    """
    hf_path, output = Path(hf_path), Path(output)
    hf_config = load_hf_config(hf_path)
    _refuse_existing(output)
    with SafetensorsFolder(hf_path, hf_config.model_type) as folder:
        check_tensors(folder, hf_config)
        dtypes, most = folder.dtypes(), folder.dtype()
        size = folder.num_bytes()
    check_room(output.parent, size, f"the converted model {output}", _NO_ROOM)
    sizes = (tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size)
    layout = _layout(_dtype_name(most, hf_path), *sizes, hf_path=str(hf_path))
    temporary = output.with_name(f".{output.name}.tmp")
    with process_groups(layout) as groups, room_or_refusal(temporary, output, size, _NOTHING_WRITTEN):
        try:
            stages = [time.perf_counter()]
            if verify:
                _report(groups, describe_check(hf_path))
                verdict = _verify_layers(hf_path, layout, groups, bound)
            stages.append(time.perf_counter())
            chunks = _write(temporary, hf_path, layout, groups, dtypes, most)
            stages.append(time.perf_counter())
            if verify and verify != "auto":
                _verify_bits(chunks, temporary, hf_path, hf_config, groups)
                verdict += f"; all {len(dtypes)} tensors have the files' bits"
            del chunks
            if verify == "all":
                verdict += f"; of the checkpoint, {_verify_layers(hf_path, layout, groups, bound, temporary)}"
            on_rank_zero(lambda: os.rename(temporary, output))
            if verify:
                _report_verdict(groups, verdict, [*stages, time.perf_counter()])
            _report(groups, f"wrote {output} ({layout.dtype}, {hf_config.model_type})")
        except UserError:
            if groups.rank == 0:  # raised on every rank: nobody uses it any more
                shutil.rmtree(temporary, ignore_errors=True)
            raise


def _layout(dtype: str, tp: int, pp: int, ep: int, hf_path: str | None = None) -> ModelConfig:
    return ModelConfig(
        hf_path=hf_path,
        dtype=dtype,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
    )


def _report_verdict(groups: ParallelGroups, verdict: str, stages: list[float]) -> None:
    """Print what was verified; `stages` are the times around the layers' check, the conversion and the bits' check."""
    layers, converted, bits = (after - before for before, after in itertools.pairwise(stages))
    _report(groups, f"{verdict} ({converted:.1f} s for the conversion, {layers + bits:.1f} s to verify it)")


def _write(
    temporary: Path,
    hf_path: Path,
    layout: ModelConfig,
    groups: ParallelGroups,
    dtypes: dict[str, torch.dtype],
    most: torch.dtype,
) -> list[torch.nn.Module]:
    """Read a folder, write its checkpoint and return the model's chunks; `most`: the dtype of most numbers."""
    hf_config = load_hf_config(hf_path)
    chunks = build_model(hf_config, layout, groups, training=False)
    kinds = widest_by_kind(dtypes)
    for _, parameter, rule in named_parameters(chunks, hf_config):
        set_dtype(parameter, dtype_of(rule, kinds))
    load_hf_weights(chunks, hf_config, hf_path, groups)
    check_finite(chunks, "model", f"as read from {hf_path}", "Take a whole copy of the weights.")
    on_rank_zero(lambda: shutil.rmtree(temporary, ignore_errors=True))
    save_checkpoint_weights(chunks, temporary, hf_path, note=lambda folder: write_record(folder, dtypes, most))
    return chunks


def _verify_layers(
    hf_path: Path, layout: ModelConfig, groups: ParallelGroups, bound: float, checkpoint: Path | None = None
) -> str:
    try:
        return str(verify_model(hf_path, layout, groups, bound=bound, checkpoint=checkpoint))
    except UserError as error:
        raise UserError(f"{error} Nothing was written.") from error


def _verify_bits(
    chunks: list[torch.nn.Module], checkpoint: Path, hf_path: Path, hf_config: Any, groups: ParallelGroups
) -> None:
    """Read a checkpoint back into the chunks that it was written of, and compare them with the files; collective."""
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data[..., :1] = float("nan")  # of every row: what was not read again differs
    load_checkpoint_weights(chunks, checkpoint)
    found: list[Any] = [None] * groups.world_size
    dist.all_gather_object(found, find_difference(chunks, hf_config, hf_path, groups))
    names = [name for name in found if name is not None]
    if names:
        raise UserError(
            f"{hf_path}: {names[0]} is not in the checkpoint as it is in the files; nothing was written. Look at the "
            "disk and at the memory of this machine, and convert again."
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
    record = read_record(checkpoint)
    stored = _dtype_name(record[0] if record else stored_dtype(checkpoint), checkpoint)
    layout = _layout(stored, tensor_model_parallel_size, pipeline_model_parallel_size, expert_model_parallel_size)
    temporary = output.with_name(f".{output.name}.tmp")
    size = folder_bytes(checkpoint)
    check_room(output.parent, size, f"the exported model {output}", _NO_ROOM)
    with process_groups(layout) as groups, room_or_refusal(temporary, output, size, _NOTHING_WRITTEN):
        chunks = build_model(hf_config, layout, groups, training=False)
        take_stored_dtypes(chunks, sharded_weights(chunks), checkpoint)
        load_checkpoint_weights(chunks, checkpoint)
        check_finite(chunks, "model", f"as read from {checkpoint}", "Export an earlier checkpoint.")
        if dtype == "float16":
            remedy = "float16 ends at 65504: export in bfloat16 or float32."
            check_finite(chunks, "model", f"of {checkpoint} in float16", remedy, torch.float16)

        def prepare() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            copy_files(checkpoint / HF_FOLDER, temporary, ["*"])
            _write_config(temporary / "config.json", dtype or stored)

        on_rank_zero(prepare)
        target: Any = None if dtype is None else getattr(torch, dtype)
        if target is None and record is not None:
            default, others = record
            target = lambda name: others.get(name, default)  # noqa: E731
        save_hf_weights(chunks, hf_config, temporary, groups, target)
        on_rank_zero(lambda: os.rename(temporary, output))
        _report(groups, f"wrote {output} ({dtype or stored}, {hf_config.model_type})")


def stored_dtype(checkpoint: str | Path) -> torch.dtype:
    """Return the dtype of most of a checkpoint's numbers."""
    return common_dtype(stored_tensors(checkpoint))


def _dtype_name(dtype: torch.dtype, path: Path) -> str:
    if dtype not in DTYPE_NAMES:
        raise UserError(
            f"{path} holds weights of {dtype}; expected {', '.join(DTYPE_NAMES.values())}. Load the model with "
            "transformers in one of them and save it first."
        )
    return DTYPE_NAMES[dtype]


def _write_config(config_file: Path, dtype: str) -> None:
    """Set the dtype of an exported config, which transformers 4 and 5 then read alike."""
    config = {**read_config(config_file), "dtype": dtype}
    config.pop("torch_dtype", None)  # its name before transformers 5, which `portable_config` sets
    config_file.write_text(json.dumps(portable_config(config), indent=2) + "\n", encoding="utf-8")


def _refuse_existing(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists already; remove it or give another folder.")


def _report(groups: ParallelGroups, text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)
