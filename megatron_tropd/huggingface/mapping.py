"""Maps Hugging Face tensors to Megatron parameters, and cuts a tensor-parallel rank's shard of them.

Pure functions of names and tensors: nothing of files, processes or models. `d` is the head width, `a` the query heads
and `g` the key/value heads of the whole model; Megatron interleaves the fused projection by key/value group:
[g, a / g + 2, d] rows are (queries of the group, key, value).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

# A lazily read Hugging Face tensor: `read(name, rows, columns)` with slices of its first and second axis.
Read = Callable[[str, slice, slice], torch.Tensor]
_ALL = slice(None)


@dataclass(frozen=True)
class Shape:
    """The sizes that the mapping needs."""

    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    experts: int = 0  # of a layer


@dataclass(frozen=True)
class Rule:
    """`sources`: Hugging Face names, {i} for the layer, {e} for the expert. `kind`: how they are cut and joined."""

    sources: tuple[str, ...]
    kind: str  # replicated | columns | gated | qkv | vocab
    expert: int | None = None  # which of a rank's own experts it is of

    def of_expert(self, first: int) -> Rule:
        """Return the rule with the expert's number in the whole layer, `first` being that of the rank's first."""
        if self.expert is None:
            return self
        return Rule(tuple(source.format(e=first + self.expert) for source in self.sources), self.kind, self.expert)


_LAYER = "model.layers.{i}."
_QKV = tuple(_LAYER + f"self_attn.{p}_proj" for p in "qkv")
_NORM_1 = Rule((_LAYER + "input_layernorm.weight",), "replicated")
_NORM_2 = Rule((_LAYER + "post_attention_layernorm.weight",), "replicated")
_RULES = {
    "input_layernorm.weight": _NORM_1,
    "self_attention.linear_qkv.layer_norm_weight": _NORM_1,  # Transformer Engine fuses the norm into the projection
    "pre_mlp_layernorm.weight": _NORM_2,
    "mlp.linear_fc1.layer_norm_weight": _NORM_2,
    "self_attention.linear_qkv.weight": Rule(tuple(f"{n}.weight" for n in _QKV), "qkv"),
    "self_attention.linear_qkv.bias": Rule(tuple(f"{n}.bias" for n in _QKV), "qkv"),
    "self_attention.q_layernorm.weight": Rule((_LAYER + "self_attn.q_norm.weight",), "replicated"),
    "self_attention.k_layernorm.weight": Rule((_LAYER + "self_attn.k_norm.weight",), "replicated"),
    "self_attention.linear_proj.weight": Rule((_LAYER + "self_attn.o_proj.weight",), "columns"),
    "mlp.linear_fc1.weight": Rule((_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"), "gated"),
    "mlp.linear_fc2.weight": Rule((_LAYER + "mlp.down_proj.weight",), "columns"),
}
_ROUTERS = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight"}
_MIXTRAL, _QWEN3 = "block_sparse_moe.experts.{e}", "mlp.experts.{e}"
_EXPERTS = {  # gate, up and down projection
    "mixtral": (f"{_MIXTRAL}.w1.weight", f"{_MIXTRAL}.w3.weight", f"{_MIXTRAL}.w2.weight"),
    "qwen3_moe": (f"{_QWEN3}.gate_proj.weight", f"{_QWEN3}.up_proj.weight", f"{_QWEN3}.down_proj.weight"),
}
# Of Megatron's local layers, and of Transformer Engine's grouped ones.
_EXPERT_NAME = re.compile(r"mlp\.experts\.(?:local_experts\.(\d+)\.)?linear_fc([12])\.weight(\d*)$")
_EMBEDDING = "model.embed_tokens.weight"
_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)$")


def rule_of(name: str, layers: Sequence[int], tied: bool, model_type: str = "llama") -> Rule:
    """Return the rule of Megatron's parameter `name`; `layers`: the Hugging Face numbers of its chunk's layers."""
    if name == "embedding.word_embeddings.weight":
        return Rule((_EMBEDDING,), "vocab")
    if name == "output_layer.weight":
        return Rule((_EMBEDDING if tied else "lm_head.weight",), "vocab")
    if name == "decoder.final_layernorm.weight":
        return Rule(("model.norm.weight",), "replicated")
    match = _NAME.match(name)
    rule = None if match is None else _RULES.get(match[2]) or _expert_rule(match[2], model_type)
    if match is None or rule is None:
        raise KeyError(f"no Hugging Face counterpart of Megatron's parameter {name}")
    layer = str(layers[int(match[1])])
    return Rule(tuple(source.replace("{i}", layer) for source in rule.sources), rule.kind, rule.expert)


def _expert_rule(name: str, model_type: str) -> Rule | None:
    """Return the rule of a router's or an expert's parameter, named within its layer."""
    if model_type not in _EXPERTS:
        return None
    if name == "mlp.router.weight":
        return Rule((_LAYER + _ROUTERS[model_type],), "replicated")
    match = _EXPERT_NAME.match(name)
    if match is None:
        return None
    *gated, down = (_LAYER + source for source in _EXPERTS[model_type])
    expert = int(match[1] or match[3])
    return Rule(tuple(gated), "gated", expert) if match[2] == "1" else Rule((down,), "columns", expert)


def expert_names(model_type: str) -> tuple[str, str, str] | None:
    """Return the names, within a layer, of expert {e}'s gate, up and down projection; None for dense models."""
    return _EXPERTS.get(model_type)


def router_name(model_type: str) -> str:
    """Return the name, within a layer, of the matrix that chooses experts."""
    return _ROUTERS[model_type]


def shard_parts(
    rule: Rule, read: Read, shape: Shape, rank: int, size: int, shard: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every part of rank `rank` of `size`'s shard with what the files hold for it: nothing is copied.

    The first of a pair is a view of `shard`, the second a tensor of the files, or zeros for rows beyond the vocabulary;
    they differ in shape where the files do. An expert's rank and size are those of expert tensor parallelism.
    """
    if rule.kind == "replicated":
        yield shard, read(rule.sources[0], _ALL, _ALL)
    elif rule.kind == "columns":
        width = shard.size(1)
        yield shard, read(rule.sources[0], _ALL, slice(rank * width, (rank + 1) * width))
    elif rule.kind == "vocab":
        start = rank * shard.size(0)
        count = max(min(shape.vocab - start, shard.size(0)), 0)
        if count:
            yield shard[:count], read(rule.sources[0], slice(start, start + count), _ALL)
        if count < shard.size(0):
            yield shard[count:], torch.zeros(shard[count:].shape, dtype=shard.dtype)
    elif rule.kind == "gated":
        half = shard.size(0) // 2
        for part, source in zip(shard.split(half), rule.sources, strict=True):
            yield part, read(source, slice(rank * half, (rank + 1) * half), _ALL)
    else:
        assert rule.kind == "qkv"
        groups, heads = shape.kv_heads // size, shape.heads // shape.kv_heads
        sizes = [heads * shape.head_dim, shape.head_dim, shape.head_dim]
        grouped = shard.unflatten(0, (groups, sum(sizes))).split(sizes, dim=1)
        for part, source in zip(grouped, rule.sources, strict=True):
            rows = part.size(0) * part.size(1)
            tensor = read(source, slice(rank * rows, (rank + 1) * rows), _ALL)
            yield part, tensor.reshape(part.shape) if tensor.numel() == part.numel() else tensor


def split_full(rule: Rule, shards: list[torch.Tensor], shape: Shape) -> dict[str, torch.Tensor]:
    """Turn all ranks' shards of one parameter back into its Hugging Face tensors: the inverse of `shard_parts`."""
    names = rule.sources
    if rule.kind == "replicated":
        return {names[0]: shards[0]}
    if rule.kind == "columns":
        return {names[0]: torch.cat(shards, dim=1)}
    if rule.kind == "vocab":
        return {names[0]: torch.cat(shards)[: shape.vocab]}
    if rule.kind == "gated":
        halves = [shard.chunk(2) for shard in shards]
        return {name: torch.cat([half[i] for half in halves]) for i, name in enumerate(names)}
    assert rule.kind == "qkv"
    sizes = [shape.heads // shape.kv_heads * shape.head_dim, shape.head_dim, shape.head_dim]
    full = torch.cat(shards)
    grouped = full.reshape(shape.kv_heads, sum(sizes), *full.shape[1:]).split(sizes, dim=1)
    return {name: part.flatten(0, 1) for name, part in zip(names, grouped, strict=True)}
