"""fused_linear_logprobs: vocab_parallel_logprobs without ever holding the logits of more than a chunk of tokens."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist

from megatron_tropd.kernels.fused_linear_logprobs import reference
from megatron_tropd.kernels.fused_linear_logprobs.function import FusedLinearLogprobs
from megatron_tropd.kernels.implementations import choose
from megatron_tropd.kernels.linear import check_linear
from megatron_tropd.kernels.logprobs.function import LogProbs, WithMaxProbability, as_outputs
from megatron_tropd.kernels.sharding import VocabShard, check_leading


@overload
def fused_linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_max_probability: Literal[False] = ...,
    mask: torch.Tensor | None = ...,
    implementation: str = ...,
) -> LogProbs: ...


@overload
def fused_linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = ...,
    with_entropy: bool = ...,
    with_max_probability: Literal[True],
    mask: torch.Tensor | None = ...,
    implementation: str = ...,
) -> WithMaxProbability: ...


def fused_linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    with_max_probability: bool = False,
    mask: torch.Tensor | None = None,
    implementation: str = "auto",
) -> LogProbs | WithMaxProbability:
    """Return log softmax(hidden weight^T / temperature) at a few ids per token; logits are made chunk by chunk, twice.

    One packed all-gather forward, none backward. With tp > 1 the gradient of `hidden` is this shard's part: pass hidden
    states that went through Megatron's `copy_to_tensor_model_parallel_region` (or, with sequence parallelism,
    `gather_from_sequence_parallel_region`), whose backward sums the parts, as Megatron's own output layer does.

    Args:
        hidden: [..., h] fp32, bf16 or fp16, the whole h on every rank.
        weight: [V/tp, h], this rank's shard of the output layer, of the same dtype. Its gradient is summed in fp32,
            into `weight.main_grad` where Megatron's DDP gave it one.
        ids: [..., j] int64 global token ids in [0, vocab_size).
        group, vocab_size, temperature, with_entropy, with_max_probability: as in `vocab_parallel_logprobs`.
        mask: [...] bool; rows where it is False give zeros and no gradient (their logits are made all the same).
        implementation: of the passes over a chunk: auto, triton, chunked; or reference (float64, all at once).

    Returns:
        log-probs [..., j] fp32, entropy [...] fp32 or None, and with `with_max_probability` that [...] fp32.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation.
    """
    check_linear(hidden, weight, "the")
    check_leading(mask, hidden=hidden, ids=ids)
    rows, flat_ids = hidden.reshape(-1, hidden.size(-1)), ids.reshape(-1, ids.size(-1))
    flat_mask = None if mask is None else mask.reshape(-1)
    shard = VocabShard.of(weight.size(0), group, vocab_size)
    if implementation == "reference":
        result = reference.logprobs(rows, weight, flat_ids, group, vocab_size, temperature, flat_mask)
    else:
        passes = choose("fused_linear_logprobs", "logprobs", implementation, hidden.device)
        result = FusedLinearLogprobs.apply(
            rows, weight, flat_ids, flat_mask, shard, 1.0 / temperature, with_entropy, passes
        )
    return as_outputs(result, ids.shape, with_entropy, with_max_probability)
