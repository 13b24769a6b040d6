"""Time, peak extra memory, memory traffic and copy bandwidth of a call, on CPU and on CUDA."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Measurement:
    """Of one call: median seconds, peak bytes beyond the inputs, bytes its operators read and wrote (None: unseen)."""

    seconds: float
    extra_bytes: int
    moved_bytes: int | None


def measure(call: Callable[[], object], device: torch.device, repeats: int, count_traffic: bool) -> Measurement:
    """Run `call` to warm up, then `repeats` times for the clock, once for memory and once for traffic.

    The first call compiles; on CUDA two more let the clocks rise and the allocator settle.
    """
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    seconds = statistics.median(_timed(call, device) for _ in range(repeats))
    extra = _peak_on_cuda(call, device) if device.type == "cuda" else peak_on_cpu(call)
    return Measurement(seconds, extra, _traffic(call) if count_traffic else None)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


def _peak_on_cuda(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def peak_on_cpu(call: Callable[[], object]) -> int:
    """Largest running sum of what PyTorch's CPU allocator gave out during the call, from the profiler's records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


# Operators that hand out memory or another view of it, and move nothing.
FREE_OPERATORS = frozenset(
    (
        *("view", "reshape", "slice", "select", "t", "transpose", "expand", "unsqueeze", "squeeze", "detach", "alias"),
        *("empty", "empty_like", "new_empty", "as_strided", "split", "unbind", "permute", "_unsafe_view"),
    )
)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of every operator's tensors: what it reads and what it writes, were nothing cached."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._schema.name.removeprefix("aten::") not in FREE_OPERATORS:
            flat = torch.utils._pytree.tree_leaves((args, kwargs, result))
            self.bytes += sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))
        return result


def _traffic(call: Callable[[], object]) -> int:
    with _Traffic() as seen:
        call()
    return seen.bytes


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes a second, read and written, of a plain copy of 512 MiB (256 MiB on CPU)."""
    source = torch.ones((512 if device.type == "cuda" else 256) << 18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = statistics.median(_timed(lambda: target.copy_(source), device) for _ in range(7))
    return 2 * source.numel() * source.element_size() / seconds


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Return b of seconds = a * sizes^b, fitted by least squares of the logarithms."""
    x, y = torch.tensor(sizes).double().log(), torch.tensor(seconds).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
