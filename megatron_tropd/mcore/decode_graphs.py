"""Decode steps of Megatron's dynamic engine as CUDA graphs: one launch per step instead of hundreds.

A decode step of a 32-layer model is some 400 kernels, whose launches take longer than the kernels at any batch size in
use. `GraphedDecoding` stands between the engine and the model: it captures the model's whole forward pass once per
padded batch size (Megatron rounds decode batches up to multiples of 64) and replays it. Everything that a decode step
reads (tokens, block table, lengths, cache) lies in buffers that Megatron's context fills in place; so graphs live as
long as the context, one rollout. Megatron's own graphs capture layer by layer, one launch and a check of all
arguments per layer, and stay attached to the layers that train.

Part of the compatibility layer: it relies on DynamicInferenceContext of 0.16 to 0.19.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from megatron_tropd.kernels.implementations import triton_runs_on
from megatron_tropd.mcore.kv_cache import layout_obstacle

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

# Steps of a size that run eagerly first: they fill caches (rotary embeddings, cuBLAS, NCCL) and compile Triton kernels,
# and a size that hardly occurs is not worth a capture.
_EAGER_STEPS = 3


def graph_obstacle(config: Any, groups: Any, choice: str, attention: str) -> str | None:
    """Return why decode steps of a model are not captured in CUDA graphs, None if they are.

    Args:
        config: the model's TransformerConfig.
        groups: its parallel.ParallelGroups.
        choice: `rollout.cuda_graphs`, auto or off.
        attention: flash or plain, as megatron_attention_compat chose.
    """
    if groups.device.type != "cuda":
        return "there is no CUDA device"
    if attention == "plain" and not triton_runs_on(groups.device):
        return "without Triton the attention over the paged cache reads lengths on the host"
    return layout_obstacle(choice, groups.pp_size, config.num_moe_experts is not None)


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    tokens: torch.Tensor  # [1, n] int64, read by the graph
    position_ids: torch.Tensor  # [1, n] int64, read by the graph


class GraphedDecoding(torch.nn.Module):
    """A GPTModel for Megatron's dynamic engine whose decode steps are captured once per padded batch size."""

    def __init__(self, model: GPTModel, context: Any):
        """Wrap `model`, which runs over `context`, a DynamicInferenceContext."""
        super().__init__()
        self.model: GPTModel = model
        self.config = model.config
        self.vocab_size = model.vocab_size
        self._context = context
        self._graphs: dict[int, _Graph] = {}
        self._steps: dict[int, int] = {}  # eager ones, by padded batch size
        self._pool: Any = None
        self._logits: torch.Tensor | None = None  # [1, most requests, V], which all graphs write

    @property
    def decoder(self) -> torch.nn.Module:
        """The model's decoder, which the engines inspect for layers of unknown kinds."""
        return self.model.decoder

    def set_input_tensor(self, tensor: torch.Tensor | None) -> None:
        """Hand on what an earlier pipeline stage sent; there is none."""
        self.model.set_input_tensor(tensor)

    def forward(self, tokens: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return logits [1, requests, V] of the tokens [1, n], padded to n by the engine."""
        if not self._context.is_decode_only():
            return self.model(tokens, position_ids, *args, **kwargs)
        size = tokens.size(1)
        if size not in self._graphs:
            self._steps[size] = self._steps.get(size, 0) + 1
            if self._steps[size] <= _EAGER_STEPS:
                return self._decode(tokens, position_ids, *args, **kwargs)[:, : self._active]
            self._graphs[size] = self._capture(tokens, position_ids, *args, **kwargs)
        captured = self._graphs[size]
        captured.tokens.copy_(tokens)
        captured.position_ids.copy_(position_ids)
        captured.graph.replay()
        assert self._logits is not None  # the capture made it
        return self._logits[:, : self._active]

    @property
    def _active(self) -> int:
        return self._context.total_request_count - self._context.paused_request_count

    def _decode(self, tokens: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return logits of all n rows, padding included: of a fixed shape, unlike those of the requests alone."""
        # A decode step has one token per request, in the order of requests: all of them are last tokens.
        self._context.last_token_logits = lambda hidden: hidden.squeeze(0)
        try:
            return self.model(tokens, position_ids, *args, **kwargs)
        finally:
            del self._context.last_token_logits

    def _capture(self, tokens: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> _Graph:
        tokens, position_ids = tokens.clone(), position_ids.clone()
        graph = torch.cuda.CUDAGraph()
        # Graphs run one after the other, and their results are read in between: all share one memory.
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        if self._logits is None:
            shape = (1, self._context.max_requests, self.vocab_size)
            self._logits = torch.empty(shape, dtype=self.config.params_dtype, device=tokens.device)
        try:
            # Other threads (NCCL's watchdog) go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                self._logits[:, : tokens.size(1)].copy_(self._decode(tokens, position_ids, *args, **kwargs))
        except RuntimeError as error:
            message = f"a decode step of {tokens.size(1)} requests cannot be captured in a CUDA graph ({error})"
            raise RuntimeError(f"{message}; set rollout.cuda_graphs=off") from error
        return _Graph(graph, tokens, position_ids)

    def release(self) -> None:
        """Free the graphs and their memory."""
        for captured in self._graphs.values():
            captured.graph.reset()
        self._graphs.clear()
        self._steps.clear()
        self._pool = self._logits = None
