"""Shared by the tests: fixed tolerances and one way to run a function on several gloo ranks."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Largest absolute and relative difference against a float64 reference.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

# Seconds until processes count as hanging: longer than any of them takes on a slow and busy machine, shorter than
# pytest's own limit (pyproject.toml), which cannot say which process it was.
PATIENCE = 1200.0

_MODELS = ("llama", "mixtral", "qwen2", "qwen3", "qwen3_moe")
# The fork server imports these once; every rank is then forked from it in a fraction of a second. They are what ranks
# import sooner or later.
PRELOAD = [
    *("torch", "torch.distributed", "torch.distributed.checkpoint", "torch._dynamo", "safetensors.torch"),
    *("megatron.core", "megatron.core.models.gpt.gpt_model"),
    *(
        "megatron_tropd.training.loop",
        "megatron_tropd.rollout.engine",
        "megatron_tropd.recipe",
        "megatron_tropd.validation",
    ),
    *(f"megatron_tropd.kernels.{name}.chunked" for name in ("logprobs", "full_divergence", "topk")),
    *("omegaconf", "omegaconf.grammar_parser", "pytest", "transformers", "transformers.generation"),
    *(f"transformers.models.auto.{name}_auto" for name in ("configuration", "modeling", "tokenization")),
    *(f"transformers.models.{model}.{part}_{model}" for model in _MODELS for part in ("configuration", "modeling")),
]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Compare in float64 with the tolerance of `dtype` (default: that of `actual`)."""
    tolerance = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def open_store() -> dist.TCPStore:
    """Return a store at a free port of this machine, where ranks meet as long as it lives."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _rank_main(fn: Callable, rank: int, world_size: int, port: int, folder: str, args: tuple) -> None:
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()}, MASTER_ADDR="127.0.0.1")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0")  # the store is the parent's
    torch.set_num_threads(1)
    gc.freeze()  # what is preloaded is no garbage; counting it would make full collections rare, and memory grow
    gc.collect()
    path = Path(folder, f"rank{rank}")
    try:
        result = fn(*args)
        torch.save(("ok", result), path.with_suffix(".tmp"))
    except BaseException:
        torch.save(("error", traceback.format_exc()), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)
    if world_size > 1:
        signal.pause()  # others may still connect to this rank; `run_distributed` ends it
    os._exit(0)  # leave without tearing down groups that a failed peer no longer answers


def run_distributed(fn: Callable, world_size: int, *args: Any, timeout: float = PATIENCE) -> list[Any]:
    """Call `fn(*args)` on `world_size` processes with torchrun's environment; return the results by rank.

    `fn` is a module-level function; it initialises torch.distributed itself (usually through parallel.initialize). The
    ranks meet at a store of this process, as they meet at the launcher's under torchrun.
    A rank's exception is raised here with its traceback; the other ranks are then ended. `timeout` is in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    store = open_store()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank_main, args=(fn, rank, world_size, store.port, folder, args))
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
    deadline = time.monotonic() + timeout
    while len(results) < len(ranks):
        for rank, process in enumerate(ranks):
            if rank in results:
                continue
            exit_code = process.exitcode  # read first: a rank writes its result, then leaves
            path = folder / f"rank{rank}"
            if path.exists():
                status, value = torch.load(path, weights_only=False)
                if status == "error":
                    raise RuntimeError(f"rank {rank} failed:\n{value}")
                results[rank] = value
            elif exit_code is not None:
                raise RuntimeError(f"rank {rank} died with exit code {exit_code}")
        running = {rank: process for rank, process in enumerate(ranks) if rank not in results}
        if running and time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(running)} still ran after {timeout} s")
        multiprocessing.connection.wait([process.sentinel for process in running.values()], timeout=0.02)
    return [results[rank] for rank in range(len(ranks))]
