"""torch's attention over concatenated sequences (its flash attention), where it can run.

It is there from torch 2.10, on CUDA from compute capability 8.0, in half precision; elsewhere the callers attend
sequence by sequence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _varlen_attn() -> Callable | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before torch 2.10
        return None
    return varlen_attn


def attends_variable_lengths(q: torch.Tensor) -> bool:
    """Whether `variable_length_attention` can take tensors like `q` [n, heads, d]."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.size(-1) % 8 or q.size(-1) > 256:
        return False
    return _varlen_attn() is not None and torch.cuda.get_device_capability(q.device) >= (8, 0)


def variable_length_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None = None,
    window: int = -1,
) -> torch.Tensor:
    """Return causal attention within each sequence, differentiable; the last query sees the last key.

    Args:
        q: [tokens, a, d].
        k: [cached tokens, g, d], g divides a.
        v: [cached tokens, g, d].
        cu_seqlens_q: [sequences + 1] int32, where each sequence starts in q.
        cu_seqlens_k: [sequences + 1] int32, where it starts in k.
        longest_q: most tokens of a sequence in q.
        longest_k: the same in k.
        scale: default d ** -0.5.
        window: how many earlier tokens are seen; -1: all.

    Returns:
        [tokens, a, d].
    """
    attend = _varlen_attn()
    assert attend is not None  # attends_variable_lengths says so
    options: dict[str, Any] = {}
    names = inspect.signature(attend).parameters
    if "scale" in names:
        options["scale"] = scale
    elif scale is not None:  # torch 2.10 always divides by the root of d
        q = q * (scale * q.size(-1) ** 0.5)
    if "window_size" in names:
        options["window_size"] = (window, 0)
    else:  # torch 2.10 knows all or nothing
        assert window < 0, "torch 2.10's variable-length attention has no window"
        options["is_causal"] = True
    if q.size(1) != k.size(1):
        if "enable_gqa" in names:
            options["enable_gqa"] = True
        else:
            k, v = (t.repeat_interleave(q.size(1) // t.size(1), dim=1) for t in (k, v))
    return attend(q, k, v, cu_seqlens_q.int(), cu_seqlens_k.int(), longest_q, longest_k, **options)
