"""What one training step of small models is made of: layouts, loaded weights, a batch and an objective."""

from __future__ import annotations

import torch

from support.tiny_models import VOCAB_SIZE


def make_batch():
    """Four rows of 16 positions, one of them without any loss, all kinds of tokens in the others."""
    from megatron_tropd.types import LOSS_NONE, TrainingBatch

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (4, 16), generator=generator)
    kind = torch.randint(0, 3, (4, 16), generator=generator).to(torch.int8)
    kind[:, -1] = kind[2] = LOSS_NONE
    old = -3.0 * torch.rand(4, 16, generator=generator)
    positions = torch.arange(16).expand(4, 16).contiguous()
    return TrainingBatch(tokens, tokens.roll(-1, 1), positions, kind, old, torch.arange(4))


def make_objective(name="tropd"):
    from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
    from megatron_tropd.objective.objectives import build_objective

    config = ObjectiveConfig(name=name, topk=8, temperature=1.3, beta=0.2)
    return config, build_objective(config, GuidanceConfig(beta=0.1), seed=7)


def layout(tp: int, pp: int, sequence_parallel: bool, path, ep: int = 1):
    from megatron_tropd.config import ModelConfig

    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep}
    return ModelConfig(hf_path=str(path), dtype="float32", sequence_parallel=sequence_parallel, **sizes)


def load(config, groups, training: bool):
    from megatron_tropd.models.build import build_model, load_hf_config
    from megatron_tropd.models.convert import load_model_weights

    chunks = build_model(load_hf_config(config.hf_path), config, groups, training=training)
    load_model_weights(chunks, config, groups)
    return chunks
