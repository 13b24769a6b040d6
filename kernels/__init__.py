"""Fused operations over vocabulary shards, without a `[tokens, vocabulary]` temporary; see README.md."""

from megatron_tropd.kernels.full_divergence.op import full_divergence
from megatron_tropd.kernels.fused_linear_full_divergence.op import fused_linear_full_divergence
from megatron_tropd.kernels.fused_linear_logprobs.op import fused_linear_logprobs
from megatron_tropd.kernels.logprobs.op import vocab_parallel_logprobs
from megatron_tropd.kernels.paged_attention.op import paged_decode_attention
from megatron_tropd.kernels.sharding import recut_shards
from megatron_tropd.kernels.topk.op import vocab_parallel_topk

__all__ = [
    "full_divergence",
    "fused_linear_full_divergence",
    "fused_linear_logprobs",
    "paged_decode_attention",
    "recut_shards",
    "vocab_parallel_logprobs",
    "vocab_parallel_topk",
]
