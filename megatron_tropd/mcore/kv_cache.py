"""The paged key/value cache and its decode steps, without torch: the engine and the plan ask the same functions.

cache_bytes(rounded_requests(50, tp_size=8), longest=8608, block=CUDA_BLOCK_TOKENS, token_bytes=16384)
"""

from __future__ import annotations

import math

from megatron_tropd.rounding import ceil_div, round_up

CUDA_BLOCK_TOKENS = 256  # flash-attn's paged cache wants multiples of it
CPU_BLOCK_TOKENS = 64


def rounded_requests(requests: int, tp_size: int) -> int:
    """Return for how many requests Megatron makes its tables: a multiple of the tensor-parallel size and of 4."""
    multiple = math.lcm(4, tp_size)
    return round_up(max(1, requests), multiple)


def cache_bytes(sequences: int, longest: int, block: int, token_bytes: int) -> int:
    """Return the bytes that whole sequences take on one rank.

    Args:
        sequences: sequences that are in the cache at the same time.
        longest: tokens of each, prompt included.
        block: tokens of a block, which belongs to one sequence.
        token_bytes: keys and values of one token in all of the rank's layers.
    """
    blocks = sequences * ceil_div(longest, block) + 2  # one block is Megatron's dummy, one guards the rounding
    return blocks * block * token_bytes


def layout_obstacle(choice: str, pp_size: int, has_experts: bool) -> str | None:
    """Return why a model in such a layout decodes without CUDA graphs, None if nothing prevents them.

    Args:
        choice: `rollout.cuda_graphs`, auto or off.
        pp_size: pipeline stages.
        has_experts: whether some of its layers are MoE layers.
    """
    if choice == "off":
        return "rollout.cuda_graphs=off"
    if pp_size > 1:
        return "pipeline stages exchange hidden states through the host; prefer tensor parallelism for rollouts"
    if has_experts:
        return "the experts' token dispatcher reads counts on the host"
    return None


def decode_sizes(requests: int) -> int:
    """Return to how many batch sizes decode steps are padded on CUDA: multiples of Megatron's 64, and all requests."""
    return ceil_div(requests, 64)
