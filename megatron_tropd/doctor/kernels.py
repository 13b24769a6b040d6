"""Checks of the kernels: values and gradients of each against its float64 reference, on this device, over its group."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from megatron_tropd import kernels
from megatron_tropd.doctor.report import Check

# Largest difference from the float64 reference, relative to a number and to 1, by the dtype of what is compared.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
_TOKENS, _HIDDEN, _WIDTH, _IDS = 96, 64, 640, 5
_SPREAD = 3.0  # of logits, as language models have
_REMEDY = "set objective.kernel=chunked, and report it with the versions above"
_PAGED_REMEDY = "install flash-attn or set rollout.engine=static, and report it with the versions above"


class Material:
    """Random inputs of one rank, the same on every run; a fresh leaf each time where a gradient is wanted."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, dtype: torch.dtype):
        """`group` shares the vocabulary; its last rank holds padding."""
        self.group, self.device, self.dtype = group, device, dtype
        self.size, self.rank = (1, 0) if group is None else (group.size(), group.rank())
        self.vocab = _WIDTH * self.size - 37

    def draw(self, *shape: int, seed: int, scale: float = 1.0, sharded: bool = False) -> torch.Tensor:
        """Draw normal numbers; `sharded` ones are other numbers on each rank of the group."""
        generator = torch.Generator().manual_seed(seed + (1000 * self.rank if sharded else 0))
        return (scale * torch.randn(*shape, generator=generator)).to(self.dtype).to(self.device)

    def logits(self, seed: int) -> torch.Tensor:
        """Draw this rank's shard [n, V/tp]."""
        return self.draw(_TOKENS, _WIDTH, seed=seed, scale=_SPREAD, sharded=True).requires_grad_()

    def layer(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw hidden states [n, h] and this rank's shard of an output layer [V/tp, h]."""
        hidden = self.draw(_TOKENS, _HIDDEN, seed=seed).requires_grad_()
        scale = _SPREAD / _HIDDEN**0.5
        weight = self.draw(_WIDTH, _HIDDEN, seed=seed + 1, scale=scale, sharded=True).requires_grad_()
        return hidden, weight

    def ids(self) -> torch.Tensor:
        """Draw ids [n, j] of the whole vocabulary."""
        generator = torch.Generator().manual_seed(5)
        return torch.randint(self.vocab, (_TOKENS, _IDS), generator=generator).to(self.device)


def _logprobs(m: Material, implementation: str) -> list[torch.Tensor]:
    logits = m.logits(1)
    picked, entropy = kernels.vocab_parallel_logprobs(
        logits, m.ids(), m.group, m.vocab, temperature=0.9, with_entropy=True, implementation=implementation
    )
    assert entropy is not None  # it was asked for
    return [picked.detach(), entropy, *torch.autograd.grad(picked.sum(), [logits])]


def _topk(m: Material, implementation: str) -> list[torch.Tensor]:
    values, ids = kernels.vocab_parallel_topk(m.logits(1), 16, m.group, m.vocab, implementation=implementation)
    return [values, ids]


def _full_divergence(m: Material, implementation: str) -> list[torch.Tensor]:
    results = []
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        student = m.logits(1)
        loss = kernels.full_divergence(
            student, m.logits(2).detach(), kind, m.group, m.vocab, beta=0.3, implementation=implementation
        )
        results += [loss.detach(), *torch.autograd.grad(loss.sum(), [student])]
    return results


def _fused_logprobs(m: Material, implementation: str) -> list[torch.Tensor]:
    hidden, weight = m.layer(1)
    picked = kernels.fused_linear_logprobs(hidden, weight, m.ids(), m.group, m.vocab, implementation=implementation)[0]
    return [picked.detach(), *torch.autograd.grad(picked.sum(), [hidden, weight])]


def _fused_divergence(m: Material, implementation: str) -> list[torch.Tensor]:
    hidden, weight = m.layer(1)
    teacher_hidden, teacher_weight = (tensor.detach() for tensor in m.layer(11))
    shared = (teacher_hidden, teacher_weight, "reverse_kl", m.group, m.vocab)
    loss = kernels.fused_linear_full_divergence(hidden, weight, *shared, implementation=implementation)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), [hidden, weight])]


def _recut(m: Material, implementation: str) -> list[torch.Tensor]:
    """Redistribute vocabulary shards; the reference slices the whole tensor, which every rank can draw."""
    width = _WIDTH - 24
    if implementation != "reference":
        if m.group is None:
            return [m.logits(1).detach()[:, :width].contiguous()]
        return [kernels.recut_shards(m.logits(1).detach(), width, m.group, dim=1)]
    parts = []
    for rank in range(m.size):
        generator = torch.Generator().manual_seed(1 + 1000 * rank)
        parts.append((_SPREAD * torch.randn(_TOKENS, _WIDTH, generator=generator)).to(m.dtype))
    return [torch.cat(parts, 1)[:, m.rank * width : (m.rank + 1) * width].to(m.device)]


def _paged_attention(m: Material, implementation: str) -> list[torch.Tensor]:
    """Attend from one token per request to cached ones, in blocks whose order is shuffled, as rollouts do."""
    lengths = [1, 700, 0, 64, 300, 511]  # one row is padding
    blocks = torch.randperm(len(lengths) * 3, generator=torch.Generator().manual_seed(3)).to(m.device)
    keys, values = (m.draw(len(blocks), 256, 2, 64, seed=seed) for seed in (1, 2))  # [blocks, tokens, heads, width]
    table = blocks.view(len(lengths), 3).int()
    cached = torch.tensor(lengths, dtype=torch.int32, device=m.device)
    q = m.draw(len(lengths), 8, 64, seed=4)
    return [kernels.paged_decode_attention(q, keys, values, cached, table, implementation=implementation)]


CASES: dict[str, Callable[[Material, str], list[torch.Tensor]]] = {
    "full_divergence": _full_divergence,
    "fused_linear_full_divergence": _fused_divergence,
    "fused_linear_logprobs": _fused_logprobs,
    "paged_decode_attention": _paged_attention,
    "recut_shards": _recut,
    "vocab_parallel_logprobs": _logprobs,
    "vocab_parallel_topk": _topk,
}


def kernel_check(
    name: str, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype, implementation: str
) -> Check:
    """Compare a kernel with its float64 reference: values and gradients; collective over `group`.

    Args:
        name: of `kernels.__all__`.
        group: the ranks that share the vocabulary.
        device: of the inputs.
        dtype: of the inputs.
        implementation: objective.kernel.
    """
    title = f"kernel {name}"
    if name not in CASES:
        return Check(title, "missing", "the doctor has no case for it", needed=False)
    material = Material(group if group.size() > 1 else None, device, dtype)
    is_paged = name == "paged_decode_attention"
    if is_paged:
        implementation = "auto"  # what rollouts run, whatever the objective's kernels
    ours = CASES[name](material, implementation)  # the first call may compile
    started = time.perf_counter()
    ours = CASES[name](material, implementation)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    expected = CASES[name](material, "reference")
    # Logits, or the result, rounded to the dtype; the others compute and answer in fp32.
    rounds = dtype if is_paged or name.startswith("fused_linear") else None
    error = max(_excess(a, b, rounds) for a, b in zip(ours, expected, strict=True))
    numbers = {"error_over_tolerance": error, "seconds": seconds}
    if not error <= 1:
        detail = f"differs from its float64 reference by {error:.3g} times the tolerance ({implementation} on {device})"
        return Check(title, "wrong", detail, _PAGED_REMEDY if is_paged else _REMEDY, numbers=numbers)
    how = f"{str(dtype).removeprefix('torch.')}, {material.size} shard(s)"
    return Check(title, "ok", f"{how}: error {error:.2g} of the tolerance, {1e3 * seconds:.1f} ms", numbers=numbers)


def _excess(ours: torch.Tensor, expected: torch.Tensor, rounds: torch.dtype | None) -> float:
    """Return the largest difference, in units of what is allowed; infinity where something is not finite.

    Where logits were rounded on the way (to `rounds`), each number is compared with its tensor's largest, too: it is a
    difference of numbers as large.
    """
    if not ours.is_floating_point():
        return 0.0 if torch.equal(ours, expected) else float("inf")
    tolerance = TOLERANCES[rounds or ours.dtype]
    ours, expected = ours.double(), expected.double()
    scale = 1.0 if rounds is None else expected.abs().amax()
    excess = ((ours - expected).abs() / (tolerance * (scale + expected.abs()))).amax()
    return float(torch.nan_to_num(excess, nan=float("inf")))
