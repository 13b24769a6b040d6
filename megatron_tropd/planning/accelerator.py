"""The speed and memory of a GPU and its links, one constant each with its derivation; measures nothing.

The defaults are an H100's in a node of eight with NVLink. planning/calibration.py reads those that were measured.

    gpu = Accelerator(memory_gb=141)
    gpu.all_reduce(size=2 * 16384 * 4096, ranks=8)  # seconds
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

# Of what large matrix products reach by themselves, the share that a training step's products reach: products are
# smaller, and between them is everything else.
TRAINING_SHARE = 0.5


@dataclass(frozen=True)
class Accelerator:
    """What a GPU can do, at the shares that Megatron reaches in practice; sizes in 10^9 bytes, times in seconds."""

    memory_gb: float = 80.0
    # What the caching allocator loses between blocks of different phases, with expandable segments.
    reserve_gb: float = 1.0
    # What the driver counts as taken beside PyTorch's memory and NCCL's: context 0.5, kernels of PyTorch, Transformer
    # Engine, flash-attn and Triton 1.
    context_gb: float = 1.5
    # 32 MiB each on Hopper: two cuBLAS handles, cuBLASLt, and Transformer Engine's for four streams.
    workspaces_gb: float = 7 * 32 * 2**20 / 1e9
    # A group's first collective allocates 24 channels of rings in both directions, 10 MiB (4 + 4.7 + 0.5 of the three
    # protocols, rounded up) for each. NCCL's issue 964 measured 0.54 to 0.69 GB on four A100.
    communicator_gb: float = 24 * 2 * 10 * 2**20 / 1e9
    # Send/receive opens 32 channels to a peer, of 12 MiB with both ends: NCCL's issue 1685, eight H100, 3.3 GB of all.
    peer_gb: float = 32 * 12 * 2**20 / 1e9
    # Static inputs, outputs and nodes of one captured batch size; vLLM's logs show 6 to 28 MiB.
    graph_gb: float = 0.025

    flops: float = 800e12 * TRAINING_SHARE  # dense bf16: 769 to 798e12 measured in products of 8192 on H100 and H200
    bandwidth: float = 3.35e12 * 0.7  # bytes per second, reads and writes together, reached while decoding

    # A layer of a decode step, 12 kernels and 4 modules of Transformer Engine: launched one by one 0.56 ms, so 20 ms
    # for 32 layers and 47 ms for 80 (15 to 25 and 40 to 60 estimated); replayed from a graph what is left is each
    # kernel's start and its tail, 8 us, so 5 ms for 32 layers (4 to 8 estimated).
    layer_seconds_eager: float = 0.56e-3
    layer_seconds_graphed: float = 0.1e-3
    # Once per decode step, never in a graph: the engine's bookkeeping in Python, about 10 synchronisations, sampling.
    step_seconds: float = 2e-3
    # Each rollout captures a decode step for each padded batch size, because the cache moves: one more eager step, and
    # the instantiation of some hundred nodes. An estimate.
    capture_seconds: float = 0.5

    # A small message's all-reduce within a node, by ranks: NCCL's low-latency protocols over NVLink.
    all_reduce_seconds: Mapping[int, float] = field(default_factory=lambda: {2: 10e-6, 4: 14e-6, 8: 20e-6})
    # Bytes of a large message per second of all-reduce, by ranks; those not named here follow `link_bandwidth`.
    all_reduce_bandwidth: Mapping[int, float] = field(default_factory=dict)
    link_bandwidth: float = 450e9 * 0.8  # bytes per second and direction of a GPU's NVLink, reached by NCCL
    network_bandwidth: float = 50e9 * 0.8  # the same of its share of the network: 400 Gb/s per GPU
    # From a pipeline stage to the next: a small send/receive, and the synchronisation of the host that waits for it.
    hop_seconds: float = 100e-6
    pinned_bandwidth: float = 50e9  # bytes per second between host and GPU: PCIe 5
    pageable_bandwidth: float = 4.5e9  # the same by way of pageable memory, tensor by tensor: 3 to 6 GB/s
    node_gpus: int = 8

    @property
    def room_gb(self) -> float:
        """What a plan may fill."""
        return self.memory_gb - self.reserve_gb

    def latency(self, ranks: int) -> float:
        """Return the seconds of a small all-reduce: along log2(ranks) between, and beyond, the sizes known."""
        if ranks == 1:
            return 0.0
        known = sorted(self.all_reduce_seconds.items())
        if len(known) == 1:
            return known[0][1] * math.log2(2 * ranks) / math.log2(2 * known[0][0])
        pairs = list(zip(known, known[1:], strict=False))
        (a, low), (z, high) = next((pair for pair in pairs if ranks <= pair[1][0]), pairs[-1])
        slope = (high - low) / math.log2(z / a)
        return max(min(low, high) / 2, low + slope * math.log2(ranks / a))

    def all_reduce(self, size: float, ranks: int, spans_nodes: bool = False) -> float:
        """Return the seconds of an all-reduce of a large message of `size` bytes.

        A ring sends each byte 2 (n - 1) / n times over the slowest link.
        """
        if ranks == 1:
            return 0.0
        if spans_nodes:
            return size * 2 * (ranks - 1) / ranks / self.network_bandwidth
        if ranks in self.all_reduce_bandwidth:
            return size / self.all_reduce_bandwidth[ranks]
        link = self.link_bandwidth
        if self.all_reduce_bandwidth:
            nearest = min(self.all_reduce_bandwidth, key=lambda n: abs(math.log2(n / ranks)))
            link = self.all_reduce_bandwidth[nearest] * 2 * (nearest - 1) / nearest
        return size * 2 * (ranks - 1) / ranks / link
