"""Hugging Face weight files: read slice by slice into model chunks, written back shard file by shard file.

Reading touches only the slices that this rank holds; writing gathers one parameter at a time. So no process ever holds
more than its own part of the model and one whole matrix.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tropd.huggingface.checks import check_tensors
from megatron_tropd.huggingface.config import head_dim
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.huggingface.files import INDEX, SINGLE, SafetensorsFolder
from megatron_tropd.huggingface.mapping import Rule, Shape, rule_of, shard_parts, split_full
from megatron_tropd.huggingface.tensor_dtypes import Rounding, same_bits
from megatron_tropd.parallel.groups import ParallelGroups, all_shards
from megatron_tropd.types import UserError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_MAX_FILE_BYTES = 5 << 30


def shape_of(hf_config: Any) -> Shape:
    """Return the sizes that the mapping needs."""
    experts = experts_of(hf_config)
    return Shape(
        heads=hf_config.num_attention_heads,
        kv_heads=hf_config.num_key_value_heads,
        head_dim=head_dim(hf_config),
        vocab=hf_config.vocab_size,
        tied=bool(hf_config.tie_word_embeddings),
        experts=experts.count if experts else 0,
    )


def named_parameters(
    chunks: list[GPTModel], hf_config: Any, layers: tuple[int, ...] | None = None
) -> Iterator[tuple[str, torch.nn.Parameter, Rule]]:
    """Yield (Megatron's local name, parameter, rule) of every chunk, in the order of the layers.

    `layers`: the folder's numbers, from 0, of the layers that the model has, where they are not all.
    """
    tied, model_type = bool(hf_config.tie_word_embeddings), hf_config.model_type
    for chunk in chunks:
        numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        if layers is not None:
            numbers = [layers[number] for number in numbers]
        for name, parameter in chunk.named_parameters():
            yield name, parameter, rule_of(name, numbers, tied, model_type)


def load_hf_weights(
    chunks: list[GPTModel],
    hf_config: Any,
    hf_path: str | Path,
    groups: ParallelGroups,
    layers: tuple[int, ...] | None = None,
) -> None:
    """Fill this rank's chunks from a Hugging Face folder; no communication.

    Args:
        chunks: this rank's model chunks.
        hf_config: of the folder.
        hf_path: the folder.
        groups: process groups of the chunks.
        layers: the folder's layers that the chunks' are, where they are not all of them, from 0.

    Raises:
        UserError: a tensor is missing, has another shape than the config says, belongs to no parameter, or holds
            numbers that the parameters' dtype cannot.
    """
    with SafetensorsFolder(hf_path, hf_config.model_type) as folder, torch.no_grad():
        if layers is None:
            check_tensors(folder, hf_config)
        rounding = Rounding(hf_path, folder.dtype())
        for parameter, rule, parts in _shards(chunks, hf_config, folder, groups, layers, "reading weights"):
            for part, tensor in parts(parameter):
                part.copy_(tensor)
                rounding.add(rule, tensor, part)
        rounding.report()


def find_difference(chunks: list[GPTModel], hf_config: Any, hf_path: str | Path, groups: ParallelGroups) -> str | None:
    """Return the first Hugging Face tensor whose bits are not those of this rank's parameters, None if all are."""
    with SafetensorsFolder(hf_path, hf_config.model_type) as folder, torch.no_grad():
        for parameter, rule, parts in _shards(chunks, hf_config, folder, groups, None, "comparing weights"):
            if not all(same_bits(part, tensor.to(part.dtype)) for part, tensor in parts(parameter.cpu())):
                return " + ".join(rule.sources)
    return None


def _shards(
    chunks: list[GPTModel],
    hf_config: Any,
    folder: SafetensorsFolder,
    groups: ParallelGroups,
    layers: tuple[int, ...] | None,
    title: str,
) -> Iterator[tuple[torch.nn.Parameter, Rule, Callable[[torch.Tensor], Iterator[tuple[torch.Tensor, torch.Tensor]]]]]:
    """Yield every parameter of this rank, its rule and a function of it: see `shard_parts`."""
    shape = shape_of(hf_config)
    parameters = list(named_parameters(chunks, hf_config, layers))
    for name, parameter, rule in tqdm(parameters, desc=title, unit="tensor", delay=3, disable=groups.rank > 0):
        rule = rule.of_expert(groups.ep.rank() * shape.experts // groups.ep.size())
        group = groups.tp if rule.expert is None else groups.expert_tp

        def parts(
            shard: torch.Tensor, name: str = name, rule: Rule = rule, group: Any = group
        ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for part, tensor in shard_parts(rule, folder.read, shape, group.rank(), group.size(), shard):
                if part.shape != tensor.shape:
                    raise UserError(
                        f"{folder.path}: {' + '.join(rule.sources)} give {tuple(tensor.shape)} for a part of {name} of "
                        f"{tuple(part.shape)}; config.json does not describe these weights."
                    )
                yield part, tensor

        yield parameter, rule, parts


def save_hf_weights(
    chunks: list[GPTModel],
    hf_config: Any,
    output: str | Path,
    groups: ParallelGroups,
    dtype: torch.dtype | Callable[[str], torch.dtype] | None = None,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Write all chunks' weights as safetensors files under `output`; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        hf_config: its vocabulary cuts the padding off; tied embeddings are written once.
        output: an existing folder.
        groups: process groups of the chunks.
        dtype: of the files, or a function that gives each tensor's, by name; default: the parameters' own.
        max_file_bytes: a new file is begun beyond it.
    """
    shape, output = shape_of(hf_config), Path(output)
    writes = groups.tp_rank == 0 and groups.dp_rank == 0
    parameters = [p for p in named_parameters(chunks, hf_config) if not (shape.tied and p[0] == "output_layer.weight")]
    files: list[dict[str, int]] = []  # of this rank, in order: tensor name -> bytes
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            save_file(pending, str(output / _part_name(groups.pp_rank, len(files))), metadata={"format": "pt"})
            files.append({name: tensor.nbytes for name, tensor in pending.items()})
            pending.clear()

    for _, parameter, rule in tqdm(parameters, desc="writing weights", unit="tensor", delay=3, disable=groups.rank > 0):
        full = gather_full(parameter.detach(), rule, shape, groups)
        for name, tensor in full.items() if writes else ():
            target = dtype(name) if callable(dtype) else dtype or tensor.dtype
            tensor = tensor.to(device="cpu", dtype=target).contiguous()
            if sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_file_bytes:
                flush()
            pending[name] = tensor
    flush()
    gathered: list[Any] = [None] * groups.pp_size
    dist.all_gather_object(gathered, files, group=groups.pp)
    if writes and groups.pp_rank == 0:
        _name_files(output, gathered)


def gather_full(tensor: torch.Tensor, rule: Rule, shape: Shape, groups: ParallelGroups) -> dict[str, torch.Tensor]:
    """Return the whole Hugging Face tensors of a parameter's shard (or of its gradient's), on every rank.

    For an expert's shard, the shards of the corresponding experts on all expert-parallel ranks. Collective over the
    tensor- and expert-parallel groups.
    """
    if rule.expert is None:
        shards = [tensor] if rule.kind == "replicated" else all_shards(tensor, groups.tp)
        return split_full(rule, shards, shape)
    per_expert = zip(*(all_shards(shard, groups.ep) for shard in all_shards(tensor, groups.expert_tp)), strict=True)
    found: dict[str, torch.Tensor] = {}
    for ep_rank, of_expert in enumerate(per_expert):
        first = ep_rank * shape.experts // groups.ep.size()
        found |= split_full(rule.of_expert(first), list(of_expert), shape)
    return found


def _part_name(stage: int, number: int) -> str:
    return f".part-{stage:05d}-{number:05d}.safetensors"


def _name_files(output: Path, files_of_stages: list[list[dict[str, int]]]) -> None:
    """Give the stages' files the names that transformers expects, and write the index if there are several."""
    parts = [(stage, n, sizes) for stage, files in enumerate(files_of_stages) for n, sizes in enumerate(files)]
    if len(parts) == 1:
        (output / _part_name(0, 0)).rename(output / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for place, (stage, number, sizes) in enumerate(parts, start=1):
        name = f"model-{place:05d}-of-{len(parts):05d}.safetensors"
        (output / _part_name(stage, number)).rename(output / name)
        weight_map.update(dict.fromkeys(sizes, name))
    total = sum(sum(sizes.values()) for *_, sizes in parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
