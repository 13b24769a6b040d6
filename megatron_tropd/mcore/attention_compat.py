"""Chooses the attention of Megatron-Core's dynamic inference: flash-attn, or ours over the same paged cache.

The third part of `megatron_compat`: nothing else touches the names under which Megatron's attention module holds
flash-attn, in versions 0.16 to 0.19.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from megatron.core.transformer import attention
from packaging.version import Version

from megatron_tropd.errors import UserError
from megatron_tropd.machine.environment import FLASH_ATTN_CAPABILITY, FLASH_ATTN_LEAST
from megatron_tropd.mcore import paged_attention


@functools.cache
def flash_attn_problem() -> str | None:
    """Return why flash-attn cannot serve Megatron's dynamic inference, None if it can."""
    if any(getattr(attention, name, False) for name in ("HAVE_FA3", "HAVE_FA4")):
        return None
    if attention.flash_attn_varlen_func is None:
        return "flash-attn is not importable"
    version = metadata.version("flash-attn")
    if Version(version) < Version(FLASH_ATTN_LEAST):
        return f"flash-attn {version} is older than {FLASH_ATTN_LEAST}"
    return None


def choose_attention(choice: str, config: Any, device: torch.device) -> str:
    """Return `flash` or `plain` for `rollout.attention` = `choice` and a model's TransformerConfig.

    Raises:
        UserError: flash-attn was asked for and cannot do it.
    """
    if device.type != "cuda":
        return "plain"
    problem = flash_attn_problem() or _flash_attn_misfit(config, torch.cuda.get_device_capability(device))
    if choice == "flash" and problem:
        raise UserError(
            f"rollout.attention=flash: {problem}; use rollout.attention=auto, which then takes torch's own."
        )
    return "plain" if choice == "plain" or problem else "flash"


def _flash_attn_misfit(config: Any, capability: tuple[int, int]) -> str | None:
    """Return why flash-attn cannot serve a model on GPUs of a compute capability, None if it can."""
    if config.params_dtype == torch.float32:
        return "flash-attn computes in bfloat16 and float16 alone, and the model's dtype is float32"
    if config.kv_channels > 256:
        return f"flash-attn supports head widths up to 256, and the model's is {config.kv_channels}"
    if capability < FLASH_ATTN_CAPABILITY:
        return f"flash-attn needs compute capability 8.0, and the GPU has {capability[0]}.{capability[1]}"
    return None


@contextmanager
def inference_attention(choice: str) -> Iterator[None]:
    """Within the context Megatron's dynamic inference attends by `choice`, `flash` or `plain`."""
    if choice == "flash":
        yield
        return
    ours = {
        "flash_attn_varlen_func": paged_attention.flash_attn_varlen_func,
        "flash_attn_with_kvcache": paged_attention.flash_attn_with_kvcache,
        "is_fa_min_version": lambda *args, **kwargs: True,
        "HAVE_FA3": False,
        "HAVE_FA4": False,
    }
    before = {name: getattr(attention, name) for name in ours if hasattr(attention, name)}
    for name in before:
        setattr(attention, name, ours[name])
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(attention, name, value)
