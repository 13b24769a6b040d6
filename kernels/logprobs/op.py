"""vocab_parallel_logprobs: the one differentiable primitive over which every token-level objective is written."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist

from megatron_tropd.kernels.implementations import choose
from megatron_tropd.kernels.logprobs import reference
from megatron_tropd.kernels.logprobs.function import GatheredLogprobs, LogProbs, WithMaxProbability, as_outputs
from megatron_tropd.kernels.sharding import VocabShard, as_rows, check_leading


@overload
def vocab_parallel_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_max_probability: Literal[False] = ...,
    mask: torch.Tensor | None = ...,
    inplace_backward: bool = ...,
    implementation: str = ...,
) -> LogProbs: ...


@overload
def vocab_parallel_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_max_probability: Literal[True],
    mask: torch.Tensor | None = ...,
    inplace_backward: bool = ...,
    implementation: str = ...,
) -> WithMaxProbability: ...


def vocab_parallel_logprobs(
    logits: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_max_probability: bool = False,
    mask: torch.Tensor | None = None,
    inplace_backward: bool = False,
    implementation: str = "auto",
) -> LogProbs | WithMaxProbability:
    """Return log softmax(logits / temperature) at a few ids per token.

    One packed all-gather forward, none backward. Statistics are fp32 whatever the dtype of the logits.

    Args:
        logits: [..., V/tp] fp32, bf16 or fp16, this rank's shard; its leading dimensions must merge without a copy.
        ids: [..., j] int64 global token ids in [0, vocab_size); repeats are fine. Not checked (that would synchronise):
            an id on padding or beyond gives a log-prob of -lse, as if its logit were 0.
        group: the ranks that share the vocabulary; None for a single one.
        vocab_size: true vocabulary size; columns beyond it are padding and carry no probability.
        temperature: divides the logits.
        with_entropy: also return each row's entropy in nats, in the same pass, without gradient.
        with_max_probability: also return each row's largest probability; it costs nothing, and has no gradient.
        mask: [...] bool; rows where it is False are skipped: zeros, and no gradient.
        inplace_backward: let the gradient overwrite `logits`; only if nothing else reads them afterwards.
        implementation: auto (triton on CUDA, chunked elsewhere), triton, chunked or reference (float64).

    Returns:
        log-probs [..., j] fp32, differentiable, the same on every rank; entropy [...] fp32 or None; with
        `with_max_probability` a third, [...] fp32. Given an upstream gradient g the logits receive
        (sum_j g_j 1[v = id_j] - (sum_j g_j) softmax_v) / temperature.

    Raises:
        ValueError: shapes that do not fit, logits that would have to be copied, an unknown implementation.
    """
    check_leading(mask, logits=logits, ids=ids)
    rows = as_rows(logits)
    flat_ids = ids.reshape(-1, ids.size(-1))
    flat_mask = None if mask is None else mask.reshape(-1)
    shard = VocabShard.of(logits.size(-1), group, vocab_size)
    passes = choose("vocab_parallel_logprobs", "logprobs", implementation, logits.device)
    if passes is reference:
        result = reference.logprobs(rows, flat_ids, group, vocab_size, temperature, flat_mask)
    else:
        result = GatheredLogprobs.apply(
            rows, flat_ids, flat_mask, shard, 1.0 / temperature, with_entropy, inplace_backward, passes
        )
    return as_outputs(result, ids.shape, with_entropy, with_max_probability)
