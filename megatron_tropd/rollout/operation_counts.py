"""Counts what a stretch of code asks of the device: operations, waits of the host for a value, and collectives.

with OperationCounts() as counts:
    engine.generate(...)
counts.totals()  # {"operations": 8123, "synchronisations": 54, "collectives": 0}

Views and other operations that compute nothing are left out: on a GPU each of the counted ones is a launch. What a CUDA
graph replays is one operation that is not seen here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.kernels.benchmarks.measure import FREE_OPERATORS

# `item` as inference mode shows it, where operators that are made of others come whole.
_WAITS = {"aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero"}
_WAITS |= {"aten.masked_select", "aten._unique", "aten._unique2", "aten.unique_consecutive", "aten.bincount"}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_FREE = FREE_OPERATORS | {"chunk", "empty_strided", "set_", "split_with_sizes"}


class OperationCounts(TorchDispatchMode):
    """Counts within its context, on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = {"operations": 0, "synchronisations": 0, "collectives": 0}

    def __enter__(self) -> OperationCounts:
        """Begin to count; `Tensor.tolist`, which a CPU does without an operation, counts as a synchronisation."""
        self._tolist = tolist = torch.Tensor.tolist

        def counted(tensor: torch.Tensor) -> Any:
            if tensor.device.type == "cpu":  # else it is a copy to the host
                self._counts["synchronisations"] += 1
            return tolist(tensor)

        setattr(torch.Tensor, "tolist", counted)  # noqa: B010 (an assignment would be of another type)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """End the count."""
        setattr(torch.Tensor, "tolist", self._tolist)  # noqa: B010
        super().__exit__(*exception)

    def totals(self) -> dict[str, int]:
        """Return the numbers so far, by kind."""
        return dict(self._counts)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Count one operation and run it."""
        result = func(*args, **(kwargs or {}))
        space, name = str(func).split(".")[:2]
        if space == "c10d":
            self._counts["collectives"] += 1
            return result
        if f"{space}.{name}" in _WAITS or _reaches_host(args, result) or (name in _INDEXING and _by_mask(args)):
            self._counts["synchronisations"] += 1
        elif name not in _FREE and (func._schema.is_mutable or not _is_part_of(result, args)):
            self._counts["operations"] += 1
        return result


def _reaches_host(args: tuple, result: Any) -> bool:
    """Whether a tensor of the device came to the host."""
    if not (args and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor)):
        return False
    return args[0].device.type == "cuda" and result.device.type == "cpu"


def _by_mask(args: tuple) -> bool:
    """Whether an indexing operator gets a mask, whose true places a device must first count."""
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ())


def _is_part_of(result: Any, args: tuple) -> bool:
    """Whether a result is its input, or a view of it: a `to` or a dropout that has nothing to do, `view_as`."""
    if not (args and isinstance(args[0], torch.Tensor) and isinstance(result, torch.Tensor) and result.numel()):
        return False
    return result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
