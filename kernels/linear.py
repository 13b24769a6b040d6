"""What the fused linear operations share: logits in bounded chunks, and the weight's gradient accumulated in fp32."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

# Size of the one chunk of logits: large enough for matrix products at full speed.
LOGITS_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
LEAST_TOKENS = 512


def adds_products_in_fp32(torch_version: str) -> bool:
    """Whether that torch can add the product of half-precision matrices to an fp32 matrix on CUDA.

    torch.addmm has `out_dtype` since 2.8, and takes an fp32 matrix to add to since 2.10.
    """
    major, minor = (int(part) for part in re.findall(r"\d+", torch_version)[:2])
    return (major, minor) >= (2, 10)


def token_chunks(tokens: int, width: int, device: torch.device) -> Iterator[slice]:
    """Yield slices of tokens whose logits [c, width] have at most LOGITS_ELEMENTS elements, or c = LEAST_TOKENS."""
    size = max(LEAST_TOKENS, LOGITS_ELEMENTS.get(device.type, 1 << 27) // max(width, 1))
    yield from (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


class Logits:
    """The output layer's logits of a chunk at a time, all in one buffer."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor):
        """`hidden` [n, h] and `weight` [V/tp, h] of one dtype."""
        self.hidden, self.weight = hidden.detach(), weight.detach()
        rows = next(token_chunks(hidden.size(0), weight.size(0), hidden.device), slice(0, 0)).stop
        self._buffer = hidden.new_empty((rows, weight.size(0)))

    def __call__(self, chunk: slice) -> torch.Tensor:
        """Return logits [c, V/tp] of `chunk`; the next call overwrites them."""
        return torch.mm(self.hidden[chunk], self.weight.t(), out=self._buffer[: chunk.stop - chunk.start])


class WeightGradient:
    """Sum over chunks of gradient^T hidden in fp32: into Megatron's `main_grad` where the weight has one."""

    def __init__(self, weight: torch.Tensor, needed: bool):
        """`needed`: whether the weight receives a gradient at all."""
        self.weight = weight
        # Megatron's DDP skips the parameter's own gradient when this flag says that main_grad has it already.
        marked = needed and hasattr(weight, "grad_added_to_main_grad")
        main_grad: torch.Tensor | None = getattr(weight, "main_grad", None) if marked else None
        self.into_main = main_grad is not None
        self.total = torch.zeros_like(weight, dtype=torch.float32) if needed and main_grad is None else main_grad

    def add(self, gradient: torch.Tensor, hidden: torch.Tensor) -> None:
        """Add gradient [c, V/tp]^T hidden [c, h]."""
        if self.total is None:
            return
        if gradient.dtype == self.total.dtype:
            self.total.addmm_(gradient.t(), hidden)
        elif gradient.is_cuda and self.total.dtype == torch.float32 and adds_products_in_fp32(torch.__version__):
            torch.addmm(self.total, gradient.t(), hidden, out_dtype=torch.float32, out=self.total)
        else:
            # A half-precision product is summed in fp32 and rounded once per chunk; an fp32 one is far slower on CPU.
            self.total.add_(torch.mm(gradient.t(), hidden))

    def result(self) -> torch.Tensor | None:
        """Return what autograd should see: the gradient, or a placeholder that Megatron's DDP drops."""
        if self.into_main:
            self.weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]  # Megatron's, no Tensor declares it
            # Megatron's mark of a weight that is the embedding's too: what autograd adds up of the two is not dropped.
            is_shared = getattr(self.weight, "zero_out_wgrad", False)
            return torch.zeros_like(self.weight) if is_shared else torch.empty_like(self.weight)
        return None if self.total is None else self.total.to(self.weight.dtype)


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    """Raise ValueError unless `hidden` [..., h] and `weight` [V/tp, h] fit and have one dtype."""
    if weight.dim() != 2 or hidden.size(-1) != weight.size(1) or hidden.dtype != weight.dtype:
        raise ValueError(
            f"{name} hidden states {tuple(hidden.shape)} {hidden.dtype} and output-layer weight {tuple(weight.shape)} "
            f"{weight.dtype} must be [..., h] and [V/tp, h] of one dtype"
        )
