"""Replaces the logits of a model's output layer by a few numbers per token, inside the forward pass.

Teacher and student both use it, in either of two ways. `armed` lets a function read the `[s, b, V/tp]` logits, which
never leave the last stage's forward pass; `replaced` lets one work on the hidden states, and no logits are made.
GPTModel's own transposition to `[b, s, ...]` then copies the small result. At other times (rollouts, evaluation, a
user's own forward passes) the output layer is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from megatron_tropd.mcore.compat import unwrap_model

# (logits [s, b, V/tp], the output layer's input [s, b, h] or, sequence-parallel, [s/tp, b, h]) -> values [s, b, c]
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# (hidden states [s, b, h], the output layer's weight [V/tp, h]) -> values [s, b, c]
ComputeFromHidden = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OutputHook:
    """Attach to the chunk that owns the output layer; inert on every other pipeline stage."""

    def __init__(self, chunks: list[torch.nn.Module]):
        """Register on the output layer of the last of `chunks`, if this rank's stage has one."""
        last = unwrap_model(chunks[-1])
        self._config = last.config
        self._layer = last.output_layer if last.post_process else None
        self._group = last.pg_collection.tp
        self._compute: Compute | None = None
        self._handle = None if self._layer is None else self._layer.register_forward_hook(self._on_forward)

    def _on_forward(self, module: torch.nn.Module, args: tuple, output: tuple) -> tuple | None:
        if self._compute is None:
            return None
        logits, bias = output
        return self._compute(logits, args[0]), bias

    @contextmanager
    def armed(self, compute: Compute) -> Iterator[None]:
        """Within the context the output layer returns `compute(logits, hidden)`."""
        if self._compute is not None:
            raise RuntimeError("the output hook is armed already: score one micro-batch at a time")
        self._compute = compute
        try:
            yield
        finally:
            self._compute = None

    @contextmanager
    def replaced(self, compute: ComputeFromHidden) -> Iterator[None]:
        """Within the context the output layer makes no logits: it returns `compute(hidden, weight)`.

        Hidden states are whole on every tensor-parallel rank; the gradient that each gives them is summed over the
        ranks, as that of Megatron's own output layer.
        """
        layer = self._layer
        if layer is None:
            yield
            return

        def forward(hidden: torch.Tensor, weight: torch.Tensor | None = None, **unused: Any) -> tuple:
            return compute(self.whole(hidden), layer.weight if weight is None else weight), None

        layer.forward = forward
        try:
            yield
        finally:
            del layer.forward

    def whole(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return [s, b, h] of the output layer's input, on every tensor-parallel rank."""
        if self._config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self._group)
        return copy_to_tensor_model_parallel_region(hidden, group=self._group)

    def remove(self) -> None:
        """Take the hook off; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
