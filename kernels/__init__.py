"""Fused operations over vocabulary shards, without a `[tokens, vocabulary]` tensor of their own; see README.md."""

from megatron_tropd.kernels.logprobs.op import vocab_parallel_logprobs
from megatron_tropd.kernels.topk.op import vocab_parallel_topk

__all__ = ["vocab_parallel_logprobs", "vocab_parallel_topk"]
