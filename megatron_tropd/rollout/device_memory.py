"""GPU memory that a rollout's key/value cache may take; CUDA only."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.rollout.sampling import ELEMENTS_AT_ONCE

# fp32 logits, probabilities and their sorted copy, fp64 cumulative sums: bytes per element of one draw.
_DRAW_BYTES = 4 + 4 + 4 + 8
_SHARE = 0.95  # of what then remains; the rest is for the allocator's rounding and CUDA graphs


def free_device_gb(config: Any, step_tokens: int) -> float:
    """Return the GiB that remain free after a rollout's own tensors; the allocator's cached blocks count as free.

    Args:
        config: the model's TransformerConfig.
        step_tokens: most tokens of one step, which decide the activations of its prefills.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    size = torch.finfo(config.params_dtype).bits // 8
    # As plan_model.forward_activations: the residual stream with five copies, four tensors of the MLP's width.
    width = 6 * config.hidden_size + 4 * config.ffn_hidden_size // config.tensor_model_parallel_size
    return max(0.0, free - step_tokens * width * size - ELEMENTS_AT_ONCE * _DRAW_BYTES) * _SHARE / 2**30


def least_of_replica(value: float, groups: Any) -> float:
    """Return the least value among the ranks that hold one replica of the model; collective over them."""
    least = torch.tensor(value, dtype=torch.float64, device=groups.device)
    for group in (groups.mp, groups.cp):
        if group.size() > 1:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
    return least.item()
