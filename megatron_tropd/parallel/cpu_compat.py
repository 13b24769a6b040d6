"""Shims that let Megatron-Core run on CPU over gloo; applied once, and only where there is no CUDA.

Megatron-Core names the device "cuda" in its schedules, optimizers and random-number tracker. Here those names are
turned into the CPU: `torch.cuda`'s queries answer for the CPU, its streams and events are inert, and the functions of
torch that take a device take CUDA's for the CPU. Nothing of Megatron's logic is replaced; other calls cost nothing. To
opt out, pass `use_cpu_compat=False` to `parallel.initialize`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

logger = logging.getLogger(__name__)

_applied = False
_inference_applied = False
_CUDA_TYPE_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.float64: "torch.cuda.DoubleTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}


def _names_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _of_all(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    """Return the group of all ranks for None, as torch's collectives do."""
    group = dist.group.WORLD if group is None else group
    assert group is not None  # torch.distributed runs: a collective was called
    return group


def _all_gather_uneven(
    tensor_list: Sequence[torch.Tensor],
    tensor: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> None:
    """What NCCL does with tensors of different sizes, and gloo refuses: one broadcast a rank."""
    group = _of_all(group)
    for rank, out in enumerate(tensor_list):
        if rank == group.rank():
            out.copy_(tensor)
        dist.broadcast(out, src=dist.get_global_rank(group, rank), group=group)


def _reduce_scatter_uneven(
    output: torch.Tensor,
    input_list: Sequence[torch.Tensor],
    op: Any = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> None:
    """The same for sums: one reduction a rank."""
    group = _of_all(group)
    for rank, part in enumerate(input_list):
        total = part.clone(memory_format=torch.contiguous_format)
        dist.reduce(total, dst=dist.get_global_rank(group, rank), op=op, group=group)
        if rank == group.rank():
            output.copy_(total)


# Functions of torch that make tensors on a device of choice.
_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)


def _on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return a factory of tensors that takes CUDA devices for the CPU, and pins no memory."""

    @functools.wraps(make)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _names_cuda(kwargs.get("device")):
                kwargs["device"] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return on_cpu


def _patch_tensors() -> None:
    """Send every explicit CUDA device to the CPU, at the few places where one can be named."""
    # `with torch.device("meta")` knows factories by identity, from a list that it makes once: of the originals, which
    # the replacements call. Otherwise such a context would be ignored, and its tensors take memory.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    move, kind = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and _names_cuda(args[0]):
            args = ("cpu", *args[1:])
        return move(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return kind(self, *args, **kwargs)
        # Megatron's optimizers sort parameters by comparing this string with "torch.cuda.…".
        return _CUDA_TYPE_NAMES.get(self.dtype) or kind(self)

    def unmoved(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    for name, method in {"to": to, "type": type_, "cuda": unmoved, "pin_memory": unmoved}.items():
        setattr(torch.Tensor, name, method)
    dist.all_gather = _or_uneven(dist.all_gather, 0, _all_gather_uneven)
    dist.reduce_scatter = _or_uneven(dist.reduce_scatter, 1, _reduce_scatter_uneven)


def _or_uneven(collective: Callable, place: int, uneven: Callable) -> Callable:
    """Return a collective that hands tensors of different sizes to `uneven`; `place`: of their list among arguments."""

    @functools.wraps(collective)
    def either(*args: Any, **kwargs: Any) -> Any:
        differ = len(args) > place and len({t.size(0) for t in args[place] if t.dim()}) > 1
        return (uneven if differ else collective)(*args, **kwargs)

    return either


class _InertStream:
    """Stands in for CUDA streams and events: the CPU runs everything in order, so there is nothing to wait for."""

    def __init__(self, *args: object, **kwargs: object):
        self.cuda_stream = 0

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *exc: object) -> None:
        return None

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 0.0

    def _nothing(self, *args: object, **kwargs: object) -> None:
        return None

    record = wait = synchronize = wait_stream = wait_event = _nothing

    def record_event(self, *args: object, **kwargs: object) -> _InertStream:
        return _InertStream()


class _InertNvtx:
    rangePushA = rangePop = markA = staticmethod(lambda *args: 0)


def _constant(value: object) -> Callable[..., object]:
    """Return a new function that ignores its arguments; new each time, since torch.compile wants one object a name."""
    return lambda *args, **kwargs: value


def _patch_torch_cuda() -> None:
    answers: dict[str, object] = {
        "current_device": torch.device("cpu"),
        **dict.fromkeys(("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats", "ipc_collect"), None),
        **dict.fromkeys(("current_stream", "default_stream"), _InertStream()),
        **dict.fromkeys(("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"), 0),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, _constant(answer))
    torch.cuda.memory_stats = lambda *args, **kwargs: {}
    replaced: dict[str, object] = {"Event": _InertStream, "Stream": _InertStream}
    replaced["stream"] = lambda stream=None: contextlib.nullcontext()
    for name, replacement in replaced.items():
        setattr(torch.cuda, name, replacement)
    # The functions over it may have been imported by name already.
    torch.cuda.nvtx._nvtx = _InertNvtx()  # type: ignore[assignment]  # not the module that it is of CUDA
    for name in ("FloatTensor", "LongTensor", "IntTensor", "ByteTensor"):
        setattr(torch.cuda, name, getattr(torch, name))


def _patch_random_states() -> None:
    """Let Megatron's "CUDA" random-number tracker hold states of the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    for module, name in ((megatron_random, "_get_cuda_rng_state"), (torch.cuda, "get_rng_state")):
        setattr(module, name, lambda *args, **kwargs: torch.get_rng_state())
    for module, name in ((megatron_random, "_set_cuda_rng_state"), (torch.cuda, "set_rng_state")):
        setattr(module, name, lambda new_state, *args, **kwargs: torch.set_rng_state(new_state))

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    torch.cuda.manual_seed = manual_seed


def _patch_experts() -> None:
    """Let the experts' token dispatcher make numbers of tensors of split sizes, as it does of those on CUDA."""
    from megatron.core.transformer.moe import token_dispatcher

    move = token_dispatcher.maybe_move_tensor_to_cpu

    def move_as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        moved = move(tensor, as_numpy, record_stream)
        return moved.numpy() if as_numpy and isinstance(moved, torch.Tensor) else moved

    token_dispatcher.maybe_move_tensor_to_cpu = move_as_numbers


def apply() -> bool:
    """Make Megatron-Core run on CPU in this process and thread; idempotent; does nothing where CUDA is available.

    Returns:
        Whether the shims are active.
    """
    global _applied
    if torch.cuda.is_available():
        return False
    if not _applied:
        _patch_torch_cuda()
        _patch_tensors()
        _patch_random_states()
        _patch_experts()
        logger.info("no CUDA device: Megatron-Core runs on CPU (opt out with use_cpu_compat=False)")
        _applied = True
    return True


def apply_inference() -> None:
    """Let Megatron-Core's inference engines run on CPU: small decode batches, no CUDA kernels; idempotent.

    Needs `apply` before; does nothing where CUDA is available. megatron_attention_compat chooses the attention.
    """
    global _inference_applied
    if torch.cuda.is_available() or _inference_applied:
        return
    from megatron.core.inference import communication_utils
    from megatron.core.inference.contexts import dynamic_context

    dynamic_context.triton_append_key_value_cache = None
    dynamic_context.DynamicInferenceContext.TOKEN_ROUNDER = 4  # decode batches are padded to it; 64 otherwise
    communication_utils._is_cuda = _constant(None)
    _inference_applied = True
