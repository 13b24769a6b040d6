"""Dtypes of stored weights: files that mix dtypes (norms or routers in fp32, matrices in bf16) lose nothing.

A checkpoint stores each parameter in the widest dtype that its tensors have in any layer, and `tensor_dtypes.json`
records the dtype of each tensor, so the round trip is bit-identical. A running model holds all parameters in its own
dtype, as in transformers, and logs what it rounds.
"""

from __future__ import annotations

import json
import logging
import re
from functools import reduce
from pathlib import Path

import torch

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.mapping import Rule

logger = logging.getLogger(__name__)

FILE = "tensor_dtypes.json"
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
_NUMBERS = re.compile(r"\d+|\{e\}")


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def widest_by_kind(dtypes: dict[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the widest dtype of each kind of tensor: names that differ in layer or expert alone are of one kind.

    Megatron's checkpoints keep the layers of a kind as one tensor, which has one dtype.
    """
    found: dict[str, torch.dtype] = {}
    for name, dtype in dtypes.items():
        kind = _NUMBERS.sub("*", name)
        found[kind] = torch.promote_types(found.get(kind, dtype), dtype)
    return found


def dtype_of(rule: Rule, kinds: dict[str, torch.dtype]) -> torch.dtype:
    """Return the dtype of a parameter that is made of the rule's tensors."""
    return reduce(torch.promote_types, (kinds[_NUMBERS.sub("*", source)] for source in rule.sources))


def set_dtype(parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Give a parameter another dtype; its numbers are as they come."""
    if parameter.dtype != dtype:
        parameter.data = parameter.data.to(dtype)


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two tensors of one dtype and shape agree in every bit, NaNs and zeros' signs included."""
    wide = all(_is_in_words(tensor) for tensor in (ours, theirs))
    integer = torch.int64 if wide else _INTEGERS[ours.element_size()]  # words are compared at the memory's speed
    return torch.equal(ours.view(integer), theirs.view(integer))


def _is_in_words(tensor: torch.Tensor) -> bool:
    size = tensor.element_size()
    fits = tensor.dim() > 0 and not tensor.size(-1) * size % 8 and not tensor.storage_offset() * size % 8
    return fits and tensor.is_contiguous()


def write_record(directory: Path, dtypes: dict[str, torch.dtype], default: torch.dtype) -> None:
    """Note in a checkpoint which tensors were not of the dtype `default`; nothing where all were."""
    others: dict[str, list[str]] = {}
    for name, dtype in sorted(dtypes.items()):
        if dtype != default:
            others.setdefault(name_of(dtype), []).append(name)
    if others:
        record = {"default": name_of(default), "others": others}
        (directory / FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(directory: Path) -> tuple[torch.dtype, dict[str, torch.dtype]] | None:
    """Return what `write_record` noted: the default and the others by name; None where all tensors are alike."""
    if not (directory / FILE).exists():
        return None
    try:
        record = json.loads((directory / FILE).read_text(encoding="utf-8"))
        others = {name: _dtype_of(dtype) for dtype, names in record["others"].items() for name in names}
        return _dtype_of(record["default"]), others
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{directory / FILE} cannot be read ({type(error).__name__}: {error}). Restore it, or convert the model "
            "again."
        ) from error


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


class Rounding:
    """What parameters lose of the files' numbers, where these are of other dtypes than most."""

    def __init__(self, source: str | Path, most: torch.dtype):
        """`source`: folder that is read, for messages. `most`: dtype of most of its numbers."""
        self._source, self._most = source, most
        self._changes: dict[tuple[torch.dtype, torch.dtype], dict[tuple[str, ...], float]] = {}

    def add(self, rule: Rule, shard: torch.Tensor, parameter: torch.Tensor) -> None:
        """Note a parameter, or a part of it, that was filled from `shard`.

        Raises:
            UserError: float16 cannot hold a number of the shard.
        """
        if torch.promote_types(shard.dtype, parameter.dtype) == parameter.dtype:
            return
        if parameter.dtype == torch.float16 and not parameter.isfinite().all() and shard.isfinite().all():
            raise UserError(
                f"{self._source}: {' + '.join(rule.sources)} holds numbers up to {shard.abs().max().item():.3g}, and "
                "float16 ends at 65504; set dtype=bfloat16 or float32."
            )
        if shard.dtype != self._most:
            whole = shard.double()
            change = (parameter.detach().cpu().double() - whole).abs() / whole.abs().clamp_min(1e-30)
            found = self._changes.setdefault((shard.dtype, parameter.dtype), {})
            found[rule.sources] = max(found.get(rule.sources, 0.0), change.max().item())

    def report(self) -> None:
        """Log what was rounded of tensors whose dtype is not that of most numbers of the files."""
        for (theirs, ours), changes in self._changes.items():
            most = max(changes.values())
            logger.warning(
                "%s: %d parameters of %s beside %s are rounded to %s, as transformers rounds them in that dtype "
                "(largest relative change %.2g)",
                *(self._source, len(changes), name_of(theirs), name_of(self._most), name_of(ours), most),
            )
