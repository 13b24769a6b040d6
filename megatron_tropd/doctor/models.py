"""The small model with which the doctor and the calibration work: random, in the recipe's dtype and layout.

Nothing is read from files. The layout is the recipe's, clipped to the processes at hand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeVar

import torch

from megatron_tropd.config import ModelConfig, TeacherConfig
from megatron_tropd.models.build import build_model
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.layout import divisors
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt

Layout = TypeVar("Layout", bound=ModelConfig)

VOCAB = 1000
CONTEXT = 512
_HEAD = 64
_EOS = 0


class NumberTokenizer(Tokenizer):
    """A vocabulary of numbers without texts."""

    def __init__(self, ends: bool = True):
        """`ends`: whether a token ends a response; else every response has the length asked for."""
        self.vocab_size = VOCAB
        self.eos_id, self.eos_ids = _EOS, {_EOS} if ends else set()
        self.pad_id, self.bos_id = 1, None

    def decode(self, ids: list[int]) -> str:
        """Return no text."""
        return ""


def clip_layout(model: Layout, world_size: int) -> Layout:
    """Return a model's layout and dtype over at most `world_size` processes, without what is bound to its sizes."""
    room, sizes = world_size, {}
    for name in ("tensor", "pipeline", "context"):
        key = f"{name}_model_parallel_size" if name != "context" else "context_parallel_size"
        sizes[name] = max(size for size in divisors(getattr(model, key)) if room % size == 0)
        room //= sizes[name]
    tensor, pipeline, context = (sizes[name] for name in ("tensor", "pipeline", "context"))
    if isinstance(model, TeacherConfig):
        model = dataclasses.replace(model, ranks="shared", replicas=1)
    return dataclasses.replace(
        model,
        hf_path=None,
        checkpoint=None,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size if pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=None,
        sequence_parallel=model.sequence_parallel and tensor > 1,
    )


def hf_config(model: ModelConfig, layers: int | None = None) -> Any:
    """Return a Llama configuration that divides as the layout wants; `layers`: how many, default two per chunk."""
    from transformers import LlamaConfig

    heads = math.lcm(4, model.tensor_model_parallel_size)
    chunks = model.pipeline_model_parallel_size * (model.virtual_pipeline_model_parallel_size or 1)
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads * _HEAD,
        intermediate_size=2 * heads * _HEAD,
        num_hidden_layers=layers or 2 * chunks,
        num_attention_heads=heads,
        num_key_value_heads=max(2, model.tensor_model_parallel_size),  # shared by groups of heads, as in most models
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=_EOS,
    )


def random_model(
    config: Any, model: ModelConfig, groups: ParallelGroups, *, training: bool, seed: int = 0
) -> list[torch.nn.Module]:
    """Build this rank's chunks with random weights, the same on all replicas.

    Weights are as large as lets attention and MLPs weigh as much as the embedding, so that mistakes in them show.
    """
    chunks = build_model(config, model, groups, training=training)
    generator = torch.Generator().manual_seed(seed + 1000 * groups.pp_rank + groups.tp_rank)
    with torch.no_grad():
        for parameter in (p for chunk in chunks for p in chunk.parameters()):
            if parameter.dim() < 2:
                parameter.fill_(1.0)
            else:
                scale = 1.5 * parameter.size(1) ** -0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return chunks


def random_prompts(groups: ParallelGroups, count: int, longest: int = 24) -> list[Prompt]:
    """Draw prompts of several lengths, others on each data-parallel rank."""
    generator = torch.Generator().manual_seed(groups.dp_rank)
    prompts = []
    for place in range(count):
        length = 1 + (longest - 1) * (place + 1) // count
        tokens = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompts.append(Prompt(id=str(place), index=groups.dp_rank * count + place, tokens=tokens))
    return prompts
