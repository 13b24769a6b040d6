"""Parameters and activations of a model on one rank of a layout, as Megatron's layers keep them.

Functions of a Hugging Face config and a layout; planning/proposals.py makes a step's memory and time of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import Any

from megatron_tropd.config import ModelConfig
from megatron_tropd.huggingface.experts import Experts, experts_of
from megatron_tropd.models.build import has_qk_norm, has_qkv_bias, head_dim, padded_vocab_size
from megatron_tropd.parallel.layout import expert_tensor_parallel_size

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}  # auto: plans are for GPUs, where it is bfloat16


@dataclass(frozen=True)
class Parameters:
    """Parameters of one rank: those of MoE experts have separate data-parallel groups."""

    shared: int
    experts: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.shared + self.experts


def expert_ranks(model: ModelConfig) -> int:
    """Return the number of ranks that hold one complete set of experts."""
    ranks = model.expert_model_parallel_size * expert_tensor_parallel_size(model)
    return ranks * model.pipeline_model_parallel_size


def layer_parameters(hf: Any, model: ModelConfig, sparse: bool) -> Parameters:
    """Return the parameters of a transformer layer on one rank; `sparse`: it is an MoE layer."""
    h, hd, tp = hf.hidden_size, head_dim(hf), model.tensor_model_parallel_size
    qkv = (hf.num_attention_heads + 2 * hf.num_key_value_heads) * hd // tp
    bias = qkv if has_qkv_bias(hf) else 0
    qk_norm = 2 * hd if has_qk_norm(hf) else 0
    attention = qkv * h + bias + hf.num_attention_heads * hd * h // tp + 2 * h + qk_norm
    if not sparse:
        return Parameters(attention + 3 * hf.intermediate_size * h // tp)
    experts = _experts(hf)
    own = 3 * experts.ffn * h // expert_tensor_parallel_size(model) * experts.count // model.expert_model_parallel_size
    return Parameters(attention + experts.count * h, own)


def _experts(hf: Any) -> Experts:
    experts = experts_of(hf)
    assert experts is not None  # a sparse layer has them
    return experts


def stage_layers(layers: int, model: ModelConfig) -> list[int]:
    """Return the number of layers of each pipeline stage."""
    pp = model.pipeline_model_parallel_size
    given = [model.num_layers_in_first_pipeline_stage, *[None] * (pp - 2), model.num_layers_in_last_pipeline_stage]
    given = given if pp > 1 else [None]
    counted = (model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split)
    rest = layers + sum(counted) - sum(n or 0 for n in given)
    stages = [rest // given.count(None) if n is None else n for n in given]
    stages[0] -= counted[0]
    stages[-1] -= counted[1]
    return stages


def stage_kinds(hf: Any, model: ModelConfig) -> list[Counter[bool]]:
    """Return for each pipeline stage how many of its layers are MoE layers (True), and how many are dense (False).

    An interleaved stage's layers are taken to be adjacent.
    """
    experts = experts_of(hf)
    kinds = iter(experts.layers if experts else [False] * hf.num_hidden_layers)
    return [Counter(islice(kinds, count)) for count in stage_layers(hf.num_hidden_layers, model)]


def _layers_parameters(hf: Any, model: ModelConfig, kinds: Counter[bool]) -> Parameters:
    layers = [(count, layer_parameters(hf, model, sparse)) for sparse, count in kinds.items()]
    return Parameters(sum(n * layer.shared for n, layer in layers), sum(n * layer.experts for n, layer in layers))


def stage_parameters(hf: Any, model: ModelConfig) -> list[Parameters]:
    """Return the parameters that a rank of each pipeline stage holds, padding of the vocabulary included."""
    tp, h = model.tensor_model_parallel_size, hf.hidden_size
    table = padded_vocab_size(hf.vocab_size, tp) // tp * h
    layers = [_layers_parameters(hf, model, kinds) for kinds in stage_kinds(hf, model)]
    shared = [stage.shared for stage in layers]
    shared[0] += table
    if not (hf.tie_word_embeddings and len(shared) == 1):  # tied, the last stage has a copy
        shared[-1] += table
    shared[-1] += h
    return [Parameters(s, stage.experts) for s, stage in zip(shared, layers, strict=True)]


def whole_parameters(hf: Any) -> Parameters:
    """Return the parameters of a whole model, without padding."""
    tables = (1 if hf.tie_word_embeddings else 2) * hf.vocab_size * hf.hidden_size
    (kinds,) = stage_kinds(hf, ModelConfig())
    layers = _layers_parameters(hf, ModelConfig(), kinds)
    return Parameters(layers.shared + tables + hf.hidden_size, layers.experts)


def active_parameters(hf: Any) -> float:
    """Return the parameters of a whole model that a token meets."""
    experts, whole = experts_of(hf), whole_parameters(hf)
    return whole.shared + (whole.experts * experts.per_token / experts.count if experts else 0)


def mlp_width(hf: Any, sparse: bool) -> int:
    """Return how wide the MLP is that a token meets: that of all its experts together, or the dense one."""
    if not sparse:
        return hf.intermediate_size
    experts = _experts(hf)
    return experts.per_token * experts.ffn


def layer_cache_bytes(hf: Any, model: ModelConfig) -> int:
    """Return the bytes of one token's keys and values in one layer, on one rank."""
    return 2 * hf.num_key_value_heads // model.tensor_model_parallel_size * head_dim(hf) * BYTES[model.dtype]


def layer_activations(hf: Any, model: ModelConfig, sequence: int, fused_attention: bool, sparse: bool = False) -> float:
    """Return the bytes per token that one layer keeps for the backward pass on one rank.

    With Transformer Engine: each norm's input and output, q, k, v and the attention's output, both halves of the gated
    product and their result. Megatron's local layers keep fp32 copies in the norms, five tensors in the MLP, and the
    attention's probabilities besides. Experts, evenly chosen, keep one tensor more of the MLP's width, and the tokens
    sent to them. Selective recomputation keeps only the input of an MLP or of MoE experts, with Megatron's local layers
    instead all but what lies inside the attention; full recomputation keeps a layer's input alone.
    """
    tp, size, h = model.tensor_model_parallel_size, BYTES[model.dtype], hf.hidden_size
    shard = _token_shards(model)
    if model.recompute == "full":
        return size * h / shard
    heads, groups, hd = hf.num_attention_heads / tp, hf.num_key_value_heads / tp, head_dim(hf)
    mlp = (3 if fused_attention else 5) * size * mlp_width(hf, False) / tp
    if sparse:
        experts = _experts(hf)
        sent = h * expert_tensor_parallel_size(model) * size + 24
        kept = (4 if fused_attention else 6) * size * mlp_width(hf, True) + experts.per_token * sent
        mlp = (kept + 16 * experts.per_token + 5 * experts.count) / shard
    if fused_attention:
        streams = 4
        if model.recompute == "selective":
            mlp, streams = 0.0, 4 if sparse else 3  # the norm before a dense MLP is part of it, and recomputed with it
        return size * (streams * h / shard + (heads + 2 * groups) * hd + heads * hd) + mlp + 4 * heads
    norms = 24 * h / shard if size == 4 else (16 + 2 * size) * h / shard
    probabilities = heads * sequence * (4 if size == 4 else 4 + size)
    inside = (2 * heads + 3 * groups) * hd * size if model.recompute == "selective" else 3 * heads * hd * size
    return norms + mlp + heads * hd * size + inside + (probabilities if model.recompute is None else 0)


def forward_activations(hf: Any, model: ModelConfig, sequence: int, fused: bool) -> float:
    """Return the bytes per token that a forward pass without gradient holds at its fullest, in one layer or another.

    In the MLP: residual stream, norms and the whole input, both halves of the gated product, one more, and the result.
    In the attention: queries, keys and values beside the stream; Megatron's local one, besides, two fp32 tensors of
    scores, and a third of the probabilities in half precision.
    """
    tp, size, h = model.tensor_model_parallel_size, BYTES[model.dtype], hf.hidden_size
    stream = size * h * (1 + 5 / _token_shards(model))
    experts = experts_of(hf)
    mlp = 4 * size * mlp_width(hf, experts is not None) / tp
    if experts is not None:
        mlp += experts.per_token * size * h
    heads, groups, hd = hf.num_attention_heads / tp, hf.num_key_value_heads / tp, head_dim(hf)
    attention = size * (2 * heads + 2 * groups) * hd
    if not fused:
        attention += size * 2 * heads * hd + heads * sequence * (8 if size == 4 else 8 + size)
    return stream + max(mlp, attention)


def _token_shards(model: ModelConfig) -> int:
    """Return among how many tensor-parallel ranks the tokens outside of attention and MLP are sharded."""
    return model.tensor_model_parallel_size if model.sequence_parallel else 1
