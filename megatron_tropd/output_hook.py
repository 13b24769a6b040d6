"""A forward hook that turns the output layer's logits shard into a few numbers a token, on the spot.

Teacher and student both use it: the `[s, b, V/tp]` logits never leave the last stage's forward pass, and GPTModel's own
transposition to `[b, s, ...]` copies the small result instead of the logits. While no `compute` is armed (rollouts,
evaluation, a user's own forward passes) the hook leaves the output alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_tropd.megatron_compat import unwrap_model

# (logits [s, b, V/tp], the output layer's input [s, b, h] or, sequence-parallel, [s/tp, b, h]) -> values [s, b, c]
Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class OutputHook:
    """Attach to the chunk that owns the output layer; inert on every other pipeline stage."""

    def __init__(self, chunks: list[torch.nn.Module]):
        """Register on the output layer of the last of `chunks`, if this rank's stage has one."""
        last = unwrap_model(chunks[-1])
        self._compute: Compute | None = None
        self._handle = None
        if last.post_process:
            self._handle = last.output_layer.register_forward_hook(self._on_forward)

    @property
    def is_attached(self) -> bool:
        """Whether this rank's stage has an output layer and the hook is on it."""
        return self._handle is not None

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

    def remove(self) -> None:
        """Take the hook off; safe to call twice."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
