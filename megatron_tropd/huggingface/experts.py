"""Reads the MoE fields of a Hugging Face config (Mixtral, Qwen3-MoE); dense models have none.

experts = experts_of(hf_config)     # None, or Experts(count=128, per_token=8, ffn=768, ...)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers of a model."""

    count: int  # experts of a layer
    per_token: int  # experts that a token goes to
    ffn: int  # width of an expert
    layers: tuple[bool, ...]  # for each layer whether it is an MoE layer
    softmax_first: bool  # weights are a softmax over all experts, not over the chosen ones alone


def experts_of(hf_config: Any) -> Experts | None:
    """Return the experts of a model, None if all its layers are dense."""
    layers = range(hf_config.num_hidden_layers)
    if hf_config.model_type == "mixtral":
        return Experts(
            hf_config.num_local_experts,
            hf_config.num_experts_per_tok,
            hf_config.intermediate_size,
            tuple(True for _ in layers),
            softmax_first=False,
        )
    if hf_config.model_type == "qwen3_moe":
        step, dense = hf_config.decoder_sparse_step, hf_config.mlp_only_layers or ()
        return Experts(
            hf_config.num_experts,
            hf_config.num_experts_per_tok,
            hf_config.moe_intermediate_size,
            tuple(i not in dense and (i + 1) % step == 0 for i in layers),
            softmax_first=not hf_config.norm_topk_prob,
        )
    return None
