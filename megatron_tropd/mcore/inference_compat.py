"""Switches training models to Megatron-Core's inference engines (0.16 to 0.19) and back.

Part of the compatibility layer: nothing else switches a model's parallelism, dtype and caches for generation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.inference.communication_utils import recv_from_prev_pipeline_rank_, send_to_next_pipeline_rank
from megatron.core.tensor_parallel.layers import get_global_memory_buffer
from megatron.core.transformer.utils import set_model_to_sequence_parallel

from megatron_tropd.mcore.plain_attention import PlainAttention

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule


class _VirtualPipeline(torch.nn.Module):
    """A rank's interleaved model chunks as one model: Megatron's engines know of one chunk a stage.

    Between two chunks the hidden states go once around the pipeline's ring, the last stage handing on to the first.
    """

    def __init__(self, chunks: list[MegatronModule], groups: Any):
        super().__init__()
        self.chunks = torch.nn.ModuleList(chunks)  # registers what `_models` lists
        self.config = copy.copy(chunks[0].config)
        self.config.virtual_pipeline_model_parallel_size = None
        self.vocab_size = chunks[0].vocab_size
        self._group = groups.pp
        # The key/value cache counts a rank's own layers, whatever their number in the model.
        for local, attention in enumerate(self._attentions(), start=1):
            attention._get_pp_layer_offset_for_inference = lambda offset=attention.layer_number - local: offset

    @property
    def _models(self) -> list[MegatronModule]:
        return list(self.chunks)

    @property
    def decoder(self) -> MegatronModule:
        """One of the chunks' decoders, at which the engines look for layers of unknown kinds."""
        return self._models[0].decoder

    def _attentions(self) -> list[MegatronModule]:
        return [layer.self_attention for chunk in self._models for layer in chunk.decoder.layers]

    def release(self) -> None:
        """Give the layers their own way of counting back."""
        for attention in self._attentions():
            del attention._get_pp_layer_offset_for_inference

    def set_input_tensor(self, tensor: torch.Tensor | None) -> None:
        """Take what the stage before hands to the first chunk."""
        self._models[0].set_input_tensor(tensor)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run all chunks; logits on the last stage, hidden states [s, b, h] elsewhere."""
        output = self._models[0](*args, **kwargs)
        for chunk in self._models[1:]:
            received = torch.empty_like(output)
            send_to_next_pipeline_rank(output.contiguous(), self._group)  # the last stage's next is the first
            recv_from_prev_pipeline_rank_(received, self._group)
            chunk.set_input_tensor(received)
            output = chunk(*args, **kwargs)
        return output


@contextmanager
def inference_model(chunks: list[MegatronModule], groups: Any) -> Iterator[MegatronModule]:
    """Make of GPTModel chunks one model for Megatron's engines; restore them for training, whatever happens."""
    was_training, sequence_parallel = chunks[0].training, chunks[0].config.sequence_parallel
    for chunk in chunks:
        chunk.eval()
        if sequence_parallel:  # single tokens cannot be sharded over the sequence
            set_model_to_sequence_parallel(chunk, False)
        if groups.cp_size > 1:
            _set_whole_sequences(chunk, None)
    quantized = _stop_quantizing(chunks)
    model = chunks[0] if len(chunks) == 1 else _VirtualPipeline(chunks, groups)
    try:
        yield model
    finally:
        if model is not chunks[0]:
            model.release()
        for config, fp8 in quantized:
            config.fp8 = fp8
        for chunk in chunks:
            if sequence_parallel:
                set_model_to_sequence_parallel(chunk, True)
            if groups.cp_size > 1:
                _set_whole_sequences(chunk, groups.cp)
            chunk.train(was_training)
        _leave_inference_mode()
        _forget_rotary_cache(chunks[0])
        _drop_inference_buffers()


def attends_whole_sequences(chunks: list[MegatronModule]) -> bool:
    """Whether context-parallel ranks can each attend within whole sequences, as the static engine has it."""
    return all(
        isinstance(layer.self_attention.core_attention, PlainAttention) for c in chunks for layer in c.decoder.layers
    )


def _set_whole_sequences(chunk: MegatronModule, cp_group: dist.ProcessGroup | None) -> None:
    """Let every context-parallel rank generate all of each sequence (None), or train on its share of it (its group)."""
    chunk.rotary_pos_emb.cp_group = cp_group
    _forget_rotary_cache(chunk)
    for layer in chunk.decoder.layers:
        layer.self_attention.core_attention.whole_sequences = cp_group is None


def _stop_quantizing(chunks: list[MegatronModule]) -> list[tuple[Any, str]]:
    """Let a model that trains in 8 bits generate in its own dtype: single tokens are no shape for 8-bit products.

    Returns:
        The configs that said so, and what they said.
    """
    configs = {id(m.config): m.config for chunk in chunks for m in chunk.modules() if getattr(m, "config", None)}
    quantized = [(config, config.fp8) for config in configs.values() if getattr(config, "fp8", None)]
    for config, _ in quantized:
        config.fp8 = None
    return quantized


def _leave_inference_mode() -> None:
    """0.19 marks the process as generating until told otherwise, and then refuses sharded logits."""
    try:
        from megatron.core.inference.utils import InferenceMode
    except ImportError:
        return
    InferenceMode.unset_active()


def _forget_rotary_cache(model: MegatronModule) -> None:
    """Rotary embeddings are cached by length; those made in inference mode cannot take part in a backward pass."""
    clear = getattr(type(model.rotary_pos_emb).forward, "cache_clear", None)
    if clear is not None:
        clear()


def _drop_inference_buffers() -> None:
    """Megatron's scratch buffers outlive a call; one made in inference mode refuses to be written to in training."""
    buffers = get_global_memory_buffer().buffer
    for key in [key for key, buffer in buffers.items() if buffer is not None and buffer.is_inference()]:
        del buffers[key]
