"""Checks of devices and links: a collective per process group with its bandwidth, Transformer Engine's attention."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.doctor.models import hf_config
from megatron_tropd.doctor.report import Check
from megatron_tropd.machine.environment import Environment
from megatron_tropd.mcore.layer_specs import uses_transformer_engine
from megatron_tropd.mcore.plain_attention import PlainAttention
from megatron_tropd.models.build import transformer_config
from megatron_tropd.parallel.groups import ParallelGroups

_BYTES = {"cuda": 64 << 20, "cpu": 1 << 20}
_REPEATS = {"cuda": 10, "cpu": 3}
# Bytes per second that a ring over a link class reaches, by the GPU's name; the first that is in it.
_LINKS = (("H200", 360e9), ("H100 80GB HBM3", 360e9), ("B200", 700e9), ("GB200", 700e9), ("SXM", 200e9))
_PCIE, _BETWEEN_NODES = 12e9, 20e9
_SLOW_SHARE = 1 / 4
_ATTENTION_TOLERANCE = {"float32": 1e-2, "bfloat16": 2e-2, "float16": 1e-2}
_LENGTH, _ROWS = 256, 2


def groups_to_check(groups: ParallelGroups) -> dict[str, dist.ProcessGroup]:
    """Return the process groups of more than one rank by name, those of all ranks but once."""
    everyone = dist.group.WORLD
    assert everyone is not None  # torch.distributed runs
    named = {
        "world": everyone,
        "tensor-parallel": groups.tp,
        "pipeline-parallel": groups.pp,
        "context-parallel": groups.cp,
        "data-parallel": groups.dp,
    }
    world = dist.get_world_size()  # sizes are the same on all ranks, which must come to the same list
    return {
        name: group for name, group in named.items() if group.size() > 1 and (name == "world" or group.size() < world)
    }


def all_reduce_seconds(group: dist.ProcessGroup, device: torch.device, size: int, repeats: int) -> float:
    """Return the seconds of an all-reduce of `size` bytes; collective over the group."""
    tensor = torch.zeros(max(1, size // 4), device=device)
    dist.all_reduce(tensor, group=group)  # the first call makes the connections
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor, group=group)
    torch.cuda.synchronize()
    return (time.perf_counter() - started) / repeats


def ring_bandwidth(size: int, seconds: float, ranks: int) -> float:
    """Return bytes per second over each rank's link, were it a ring: comparable between numbers of ranks."""
    return 2 * (ranks - 1) / ranks * size / seconds


def collective_check(name: str, group: dist.ProcessGroup, device: torch.device, environment: Environment) -> Check:
    """All-reduce numbers over a group, compare the sum, and measure; collective over the group."""
    title, ranks = f"all-reduce, {name}", group.size()
    members = dist.get_process_group_ranks(group)
    mine = torch.full((1024,), float(dist.get_rank(group) + 1), device=device)
    dist.all_reduce(mine, group=group)
    expected = ranks * (ranks + 1) / 2
    if not bool((mine == expected).all()):
        detail = f"{ranks} ranks: the sum is {float(mine[0]):g}, expected {expected:g}"
        return Check(title, "wrong", detail, "run NCCL's tests between these GPUs")
    size, repeats = _BYTES[device.type], _REPEATS[device.type]
    bandwidth = ring_bandwidth(size, all_reduce_seconds(group, device, size, repeats), ranks)
    latency = all_reduce_seconds(group, device, 4, 2 * repeats)
    numbers = {"ranks": ranks, "bandwidth": bandwidth, "latency": latency}
    detail = f"{ranks} ranks, {bandwidth / 1e9:.3g} GB per second, {1e6 * latency:.0f} us for 4 bytes"
    link, expected = _expected_bandwidth(members, environment)
    if device.type == "cuda" and bandwidth < _SLOW_SHARE * expected:
        detail += f"; {link} gives about {expected / 1e9:.0f}"
        remedy = (
            "look for NCCL_DEBUG=INFO's choice of transport, NCCL_P2P_DISABLE, NCCL_IB_HCA and `nvidia-smi topo -m`"
        )
        return Check(title, "slow", detail, remedy, numbers=numbers)
    return Check(title, "ok", detail, numbers=numbers)


def _expected_bandwidth(members: list[int], environment: Environment) -> tuple[str, float]:
    nodes = {rank // environment.local_world_size for rank in members}
    if len(nodes) > 1:
        return "a network of 200 Gbit per second", _BETWEEN_NODES
    gpu = environment.gpus[0].name if environment.gpus else ""
    for part, bandwidth in _LINKS:
        if part in gpu and "PCIe" not in gpu:
            return "NVLink", bandwidth
    return "PCIe", _PCIE


def attention_check(model: ModelConfig, groups: ParallelGroups) -> Check:
    """Compare Transformer Engine's attention with the plain one, values and gradients, as training calls both."""
    name = "Transformer Engine's attention"
    if not uses_transformer_engine():
        why = "it is not installed" if torch.cuda.is_available() else "no GPU"
        return Check(name, "missing", f"{why}: layers are Megatron's own", needed=False)
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    config = transformer_config(hf_config(model), model)
    generator = torch.Generator(groups.device).manual_seed(groups.rank)
    shape = (_LENGTH // groups.cp_size, _ROWS, config.num_attention_heads // groups.tp_size, config.kv_channels)
    inputs = [torch.randn(shape, generator=generator, device=groups.device).to(config.params_dtype) for _ in range(3)]
    theirs = _attend(TEDotProductAttention, config, groups, inputs)
    ours = _attend(PlainAttention, config, groups, inputs)
    tolerance = _ATTENTION_TOLERANCE[model.dtype]
    error = max(float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(theirs, ours, strict=True))
    numbers = {"error": error}
    if not error <= tolerance:
        detail = f"differs from the plain one by {error:.3g}, tolerance {tolerance:g}"
        remedy = "unset NVTE_* variables, or install the version that this megatron-core declares"
        return Check(name, "wrong", detail, remedy, numbers=numbers)
    return Check(name, "ok", f"equals the plain one to {error:.2g}", numbers=numbers)


def _attend(kind: type, config: Any, groups: ParallelGroups, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return output and gradients, in float32, of an attention over fresh leaves of `inputs`."""
    from megatron.core.transformer.enums import AttnMaskType

    causal = AttnMaskType.causal
    settings = {"layer_number": 1, "attn_mask_type": causal, "attention_type": "self"}
    attention = kind(config=config, **settings, pg_collection=groups.collection).to(groups.device)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    output = attention(*leaves, None, causal)
    gradients = torch.autograd.grad(output.float().square().sum(), leaves)
    return [tensor.detach().float() for tensor in (output, *gradients)]
