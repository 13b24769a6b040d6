"""Shared by the tests: fixed tolerances and one way to run a function on several gloo ranks."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Largest absolute and relative difference against a float64 reference.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# The fork server imports these once; every rank is then forked from it in a fraction of a second.
_PRELOAD = ["torch", "torch.distributed", "transformers", "megatron.core", "megatron.core.models.gpt.gpt_model"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare in float64 with the tolerance of `dtype` (default: that of `actual`)."""
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank_main(fn: Callable, rank: int, world_size: int, port: int, folder: str, args: tuple) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    path = Path(folder, f"rank{rank}")
    try:
        result = fn(*args)
        torch.save(("ok", result), path.with_suffix(".tmp"))
    except BaseException:
        torch.save(("error", traceback.format_exc()), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    if rank == 0 and world_size > 1:
        signal.pause()  # it holds the store, from which others may still read; `run_distributed` ends it
    os._exit(0)  # leave without tearing down groups that a failed peer no longer answers


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = 240.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` processes with torchrun's environment; return the results by rank.

    `fn` is a module-level function; it initialises torch.distributed itself (usually through parallel.initialize).
    A rank's exception is raised here with its traceback; the other ranks are then ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, Path(folder), timeout)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(ranks: list, folder: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    waited = 0.0
    while len(results) < len(ranks):
        for rank, process in enumerate(ranks):
            path = folder / f"rank{rank}"
            if rank in results or not path.exists():
                if rank not in results and process.exitcode not in (None, 0):
                    raise RuntimeError(f"rank {rank} died with exit code {process.exitcode}")
                continue
            status, value = torch.load(path, weights_only=False)
            if status == "error":
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        if waited > timeout:
            raise TimeoutError(f"ranks {sorted(set(range(len(ranks))) - set(results))} still ran after {timeout} s")
        multiprocessing.connection.wait([p.sentinel for i, p in enumerate(ranks) if i not in results], timeout=0.02)
        waited += 0.02
    return [results[rank] for rank in range(len(ranks))]
