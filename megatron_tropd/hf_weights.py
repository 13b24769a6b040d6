"""Hugging Face weight files: read slice by slice into model chunks, written back shard file by shard file.

Reading touches only the slices that this rank holds; writing gathers one parameter at a time. So no process ever holds
more than its own part of the model and one whole matrix.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_tropd.convert_mapping import Rule, Shape, expert_suffixes, read_shard, rule_of, split_full
from megatron_tropd.experts import experts_of
from megatron_tropd.model import has_qk_norm, has_qkv_bias, head_dim
from megatron_tropd.parallel import ParallelGroups, all_shards
from megatron_tropd.types import UserError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_FILE_BYTES = 5 << 30
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old Llama files carry


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


class SafetensorsFolder:
    """The tensors of a folder's safetensors files, read lazily; use as a context manager."""

    def __init__(self, hf_path: str | Path):
        """Open every file of the folder.

        Raises:
            UserError: no safetensors files, one of the index is missing, or one is cut short.
        """
        self.path = Path(hf_path)
        self._stack = ExitStack()
        self._file_of: dict[str, Any] = {}
        for file in self._files():
            try:
                handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
            except Exception as error:
                self._stack.close()
                raise UserError(f"{file} is cut short or no safetensors file ({error}); fetch it again.") from error
            self._file_of.update(dict.fromkeys(handle.keys(), handle))

    def _files(self) -> list[Path]:
        if (self.path / _INDEX).exists():
            names = sorted(set(json.loads((self.path / _INDEX).read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.path / name).exists()]
            if missing:
                raise UserError(f"{self.path}: {missing[0]} is named in {_INDEX} and missing; fetch it again.")
            return [self.path / name for name in names]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{self.path} holds no *.safetensors files; save the model with transformers' save_pretrained, which "
                "writes them, or give another folder."
            )
        return files

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Return the names of the tensors, those of no use here left out."""
        return {name for name in self._file_of if not name.endswith(_IGNORED)}

    def read(self, name: str, rows: slice = slice(None), columns: slice = slice(None)) -> torch.Tensor:
        """Read a slice of a tensor."""
        if name not in self._file_of:
            raise UserError(f"{self.path} lacks the tensor {name}; is config.json of the same model as the weights?")
        tensor = self._file_of[name].get_slice(name)
        return tensor[rows] if len(tensor.get_shape()) == 1 else tensor[rows, columns]

    def num_elements(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(math.prod(self._file_of[name].get_slice(name).get_shape()) for name in self.names())

    def dtype(self) -> torch.dtype:
        """Return the dtype of the first tensor."""
        name = min(self._file_of)
        return self._file_of[name].get_slice(name)[:1].dtype


def named_parameters(chunks: list[torch.nn.Module], hf_config: Any) -> Iterator[tuple[str, torch.nn.Parameter, Rule]]:
    """Yield (Megatron's local name, parameter, rule) of every chunk, in the order of the layers."""
    tied, model_type = bool(hf_config.tie_word_embeddings), hf_config.model_type
    for chunk in chunks:
        layers = chunk.decoder.layers
        first_layer = layers[0].layer_number - 1 if len(layers) else 0
        for name, parameter in chunk.named_parameters():
            yield name, parameter, rule_of(name, first_layer, tied, model_type)


def load_hf_weights(chunks: list[torch.nn.Module], hf_config: Any, hf_path: str | Path, groups: ParallelGroups) -> None:
    """Fill this rank's chunks from a Hugging Face folder; no communication.

    Raises:
        UserError: a tensor is missing, has another shape than the config says, or belongs to no parameter.
    """
    shape = shape_of(hf_config)
    with SafetensorsFolder(hf_path) as folder, torch.no_grad():
        _check_names(folder, hf_config)
        parameters = list(named_parameters(chunks, hf_config))
        for name, parameter, rule in tqdm(
            parameters, desc="reading weights", unit="tensor", delay=3, disable=groups.rank > 0
        ):
            rule = rule.of_expert(groups.ep.rank() * shape.experts // groups.ep.size())
            group = groups.tp if rule.expert is None else groups.expert_tp
            shard = read_shard(rule, folder.read, shape, group.rank(), group.size(), parameter)
            if shard.shape != parameter.shape:
                raise UserError(
                    f"{hf_path}: {' + '.join(rule.sources)} give a shard of {tuple(shard.shape)} for {name}, expected "
                    f"{tuple(parameter.shape)}; config.json does not describe these weights."
                )
            parameter.copy_(shard)


def _check_names(folder: SafetensorsFolder, hf_config: Any) -> None:
    """Refuse tensors that would be dropped silently."""
    experts, model_type = experts_of(hf_config), hf_config.model_type
    suffixes = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    suffixes += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    suffixes += [f"self_attn.{p}_proj.bias" for p in "qkv"] if has_qkv_bias(hf_config) else []
    suffixes += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if has_qk_norm(hf_config) else []
    dense = [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    sparse = expert_suffixes(model_type, experts.count) if experts else []
    known = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for i in range(hf_config.num_hidden_layers):
        mlp = sparse if experts and experts.layers[i] else dense
        known |= {f"model.layers.{i}.{suffix}" for suffix in (*suffixes, *mlp)}
    unknown = sorted(folder.names() - known)
    if unknown:
        raise UserError(
            f"{folder.path} holds {len(unknown)} tensors that a {hf_config.model_type} model of "
            f"{hf_config.num_hidden_layers} layers does not have, first {unknown[0]}; is config.json of the same model?"
        )


def save_hf_weights(
    chunks: list[torch.nn.Module],
    hf_config: Any,
    output: str | Path,
    groups: ParallelGroups,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = _MAX_FILE_BYTES,
) -> None:
    """Write all chunks' weights as safetensors files under `output`; collective over all ranks.

    Args:
        chunks: this rank's model chunks.
        hf_config: its vocabulary cuts the padding off; tied embeddings are written once.
        output: an existing folder.
        groups: process groups of the chunks.
        dtype: of the files; default: the parameters' own.
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
            tensor = tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
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

    Of an expert's shard, those of the experts in its place on all expert-parallel ranks. Collective over the tensor-
    and expert-parallel groups.
    """
    if rule.expert is None:
        shards = [tensor] if rule.kind == "replicated" else all_shards(tensor, groups.tp)
        return split_full(rule, shards, shape)
    per_expert = zip(*(all_shards(shard, groups.ep) for shard in all_shards(tensor, groups.expert_tp)), strict=True)
    found = {}
    for ep_rank, shards in enumerate(per_expert):
        first = ep_rank * shape.experts // groups.ep.size()
        found |= split_full(rule.of_expert(first), list(shards), shape)
    return found


def _part_name(stage: int, number: int) -> str:
    return f".part-{stage:05d}-{number:05d}.safetensors"


def _name_files(output: Path, files_of_stages: list[list[dict[str, int]]]) -> None:
    """Give the stages' files the names that transformers expects, and write the index if there are several."""
    parts = [(stage, n, sizes) for stage, files in enumerate(files_of_stages) for n, sizes in enumerate(files)]
    if len(parts) == 1:
        (output / _part_name(0, 0)).rename(output / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for place, (stage, number, sizes) in enumerate(parts, start=1):
        name = f"model-{place:05d}-of-{len(parts):05d}.safetensors"
        (output / _part_name(stage, number)).rename(output / name)
        weight_map.update(dict.fromkeys(sizes, name))
    total = sum(sum(sizes.values()) for *_, sizes in parts)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n")
