"""Finds and names parameters or gradients that contain NaN or infinity, in one pass.

check_finite(modules, "student", f"as loaded from {path}")  # raises UserError on every rank
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.parallel.groups import any_rank

_SHOWN = 4  # tensors named by a message


def check_finite(
    modules: list[torch.nn.Module], role: str, where: str, remedy: str, dtype: torch.dtype | None = None
) -> None:
    """Refuse a model with a NaN or an infinity in a parameter; collective over the ranks of its part of the job.

    Reads every parameter once and waits for the device once.

    Args:
        modules: this rank's model chunks.
        role: student or teacher.
        where: when, or from which files: the sentence goes on with it.
        remedy: the message ends with it.
        dtype: in which the numbers must be finite; default: their own.

    Raises:
        UserError: on every rank, with the names of the tensors and their ranks.
    """
    found = not_finite(
        (name, parameter.detach().to(dtype or parameter.dtype)) for name, parameter in named_parameters(modules)
    )
    if not any_rank(bool(found)):
        return
    names = everywhere([f"{name} on rank {dist.get_rank()}" for name in found[:_SHOWN]])
    more = " and others" if len(names) > _SHOWN else ""
    raise UserError(
        f"NaN or infinity in the {role}'s weights {where}: {', '.join(names[:_SHOWN])}{more} (named as in "
        f"Megatron-Core). {remedy}"
    )


def check_loaded(modules: list[torch.nn.Module], config: ModelConfig, role: str) -> None:
    """Refuse a model whose weights are not finite after they were read; see `check_finite`."""
    source = f"{role}.checkpoint={config.checkpoint}" if config.checkpoint else f"{role}.hf_path={config.hf_path}"
    check_finite(
        modules,
        role,
        f"as read in {config.dtype} ({source}, or the checkpoint that the run continues from)",
        f"Take a whole copy of the weights; if the files' own are finite, {role}.dtype=bfloat16 holds larger ones than "
        "float16.",
    )


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Return the names of the tensors that hold a NaN or an infinity; one wait for the device."""
    names, extremes = [], []
    for name, tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            names.append(name)
            extremes.append(torch.stack(torch.aminmax(tensor.detach())).float())  # NaN stays NaN
    if not names:
        return []
    finite = torch.isfinite(torch.stack(extremes)).all(-1).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def named_parameters(modules: list[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's parameters with the numbers that their layers have in the whole model."""
    for module in modules:
        numbers = {f"decoder.layers.{i}.": layer.layer_number - 1 for i, layer in enumerate(_layers(module))}
        for name, parameter in module.named_parameters():
            local = re.match(r"decoder\.layers\.\d+\.", name)
            if local and local[0] in numbers:
                name = f"decoder.layers.{numbers[local[0]]}.{name[local.end() :]}"
            yield name, parameter


def named_gradients(modules: list[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the gradients that Megatron's DDP keeps of a model's parameters."""
    for name, parameter in named_parameters(modules):
        gradient = getattr(parameter, "main_grad", None)
        if gradient is not None:
            yield name, gradient


def everywhere(mine: list[str]) -> list[str]:
    """Return the messages of all ranks, without repetition, in rank order; collective."""
    gathered: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return list(dict.fromkeys(item for part in gathered for item in part or ()))


def _layers(module: torch.nn.Module) -> Iterable[Any]:
    decoder = getattr(module, "decoder", None)
    return getattr(decoder, "layers", ())
