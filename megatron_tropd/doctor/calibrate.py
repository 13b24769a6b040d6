"""Measures the devices for `plan --calibration`: matrix products, copies, links, the layers of a decode step.

All sizes are small: it takes about a minute. Rank 0 writes the file, with its own measurements.

    calibrate("h100.json", environment, versions)
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig, RolloutConfig
from megatron_tropd.doctor.devices import all_reduce_seconds
from megatron_tropd.doctor.models import CONTEXT, NumberTokenizer, hf_config, random_model, random_prompts
from megatron_tropd.doctor.report import Check
from megatron_tropd.kernels.benchmarks.measure import copy_bandwidth
from megatron_tropd.machine.environment import Environment
from megatron_tropd.parallel.groups import ParallelGroups, initialize
from megatron_tropd.planning.accelerator import TRAINING_SHARE
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.system.json_files import write_json
from megatron_tropd.types import Sampling

_PRODUCT = {"cuda": 8192, "cpu": 768}  # width of the square matrices
_LARGE_BYTES = {"cuda": 256 << 20, "cpu": 4 << 20}
_DEPTHS = (4, 20)  # layers of the two models whose difference is measured
_LENGTHS = (8, 40)  # tokens of the two responses whose difference is measured
_REQUESTS = 8


def calibrate(path: str, environment: Environment, versions: dict[str, str]) -> Check:
    """Measure and write the file; collective over all ranks, after which the process groups are others.

    Args:
        path: of the JSON file: seconds, bytes and floating-point operations per second, GB of memory; numbers that
            cannot be had here are null; those of links are by number of ranks, of the message's bytes.
        environment: this process's.
        versions: by name, to be written along.
    """
    groups = initialize(ModelConfig(dtype="bfloat16"))
    device = groups.device
    links = _links(device)
    memory, flops, bandwidth = (
        _memory(environment, device),
        _product_flops(device) * TRAINING_SHARE,
        copy_bandwidth(device),
    )
    eager, graphed = _layers(groups)
    content = {
        "name": environment.gpus[0].name if environment.gpus else "CPU",
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        **memory,
        "flops": flops,
        "bandwidth": bandwidth,
        "layer_seconds_eager": eager,
        "layer_seconds_graphed": graphed,
        "all_reduce_seconds": {str(ranks): small for ranks, (small, _) in links.items()},
        "all_reduce_bandwidth": {str(ranks): large for ranks, (_, large) in links.items()},
    }
    if groups.rank == 0:
        write_json(path, content)
    layer = "" if eager is None else f", a decode step's layer {1e6 * eager:.0f} us"
    layer += "" if graphed is None else f" ({1e6 * graphed:.0f} us in CUDA graphs)"
    detail = f"{flops / 1e12:.3g} TFLOP/s in training, copies {bandwidth / 1e9:.3g} GB/s{layer}"
    return Check("calibration", "ok", f"{detail}; written to {path}")


def _memory(environment: Environment, device: torch.device) -> dict[str, float | None]:
    """Return a GPU's memory in GB and what is gone of it beside torch's: CUDA's and NCCL's contexts."""
    if device.type != "cuda":
        return {"memory_gb": None, "context_gb": None}
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    used = total - free - torch.cuda.memory_reserved(device)
    return {"memory_gb": total / 1e9, "context_gb": used / 1e9}


def _product_flops(device: torch.device) -> float:
    width = _PRODUCT[device.type]
    a, b = (torch.randn(width, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * width**3 / _seconds(lambda: a @ b, 10 if device.type == "cuda" else 3)


def _seconds(call: Any, repeats: int) -> float:
    """Return the seconds of a call, after two to warm up."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def _links(device: torch.device) -> dict[int, tuple[float, float]]:
    """Return seconds of a small all-reduce and bytes per second of a large one, by number of ranks: 2, 4, 8, … all."""
    world, found = dist.get_world_size(), {}
    sizes = sorted({2**power for power in range(1, 12) if 2**power < world} | ({world} if world > 1 else set()))
    for ranks in sizes:
        if world % ranks:
            continue
        lists = [list(range(start, start + ranks)) for start in range(0, world, ranks)]
        group = dist.new_subgroups_by_enumeration(lists)[0]
        small = all_reduce_seconds(group, device, 8192, 20)
        size = _LARGE_BYTES[device.type]
        large = all_reduce_seconds(group, device, size, 5)
        found[ranks] = (small, size / large)
    return found


def _layers(groups: ParallelGroups) -> tuple[float | None, float | None]:
    """Return the seconds that a layer takes in a decode step, launched one kernel at a time and in CUDA graphs."""
    eager = _layer_seconds(groups, cuda_graphs="off")
    graphed = _layer_seconds(groups, cuda_graphs="auto") if groups.device.type == "cuda" else None
    return eager, graphed


def _layer_seconds(groups: ParallelGroups, cuda_graphs: str) -> float | None:
    """Return a layer's seconds; None where the machine was too restless for the deeper model to take longer."""
    shallow, deep = (_step_seconds(groups, layers, cuda_graphs) for layers in _DEPTHS)
    return (deep - shallow) / (_DEPTHS[1] - _DEPTHS[0]) if deep > shallow else None


def _step_seconds(groups: ParallelGroups, layers: int, cuda_graphs: str) -> float:
    """Return the seconds of a decode step of a narrow model: what does not depend on the width."""
    model = ModelConfig(dtype="bfloat16")
    config = hf_config(model, layers)
    chunks = random_model(config, model, groups, training=False)
    rollout = RolloutConfig(max_batch_size=_REQUESTS, cuda_graphs=cuda_graphs)
    engine = RolloutEngine(chunks, NumberTokenizer(ends=False), groups, rollout, max_sequence_length=CONTEXT)
    prompts = random_prompts(groups, _REQUESTS)

    def generate(tokens: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        engine.generate(prompts, [[] for _ in prompts], Sampling(max_new_tokens=tokens, temperature=0.0))
        torch.cuda.synchronize()
        return time.perf_counter() - started

    generate(_LENGTHS[0])  # compiles
    short, long = (min(generate(tokens) for _ in range(3)) for tokens in _LENGTHS)
    return (long - short) / (_LENGTHS[1] - _LENGTHS[0])
