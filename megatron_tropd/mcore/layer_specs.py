"""Chooses the classes of layers: Transformer Engine's on CUDA if it can be imported, else Megatron's local ones.

Megatron's own specs, with a norm that knows sequence parallelism and an attention that knows packed sequences and
context parallelism in the local ones.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_tropd.mcore.compat import is_of_experts, mend_router_without_transformer_engine
from megatron_tropd.mcore.plain_attention import PlainAttention


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the constructor of Megatron's norms; WrappedTorchNorm has no sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any):
        """Take `eps` from the caller, dtype and sequence parallelism from `config`."""
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        # Tells finalize_model_grads to sum this weight's gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark


def uses_transformer_engine() -> bool:
    """Whether models are built of Transformer Engine's layers: it is importable and there is a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def block_spec(
    config: TransformerConfig, pp_rank: int, vp_stage: int | None, use_transformer_engine: bool
) -> TransformerBlockSubmodules:
    """Return the specs of the layers of one pipeline stage, or of one of its virtual stages.

    Args:
        config: of the model; moe_layer_freq marks the MoE layers.
        pp_rank: the stage.
        vp_stage: the virtual stage; None without interleaving.
        use_transformer_engine: its layers; else Megatron's local ones.
    """
    place = {"vp_stage": vp_stage, "pp_rank": pp_rank}
    if use_transformer_engine:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=True, **place)
    if config.num_moe_experts is not None:
        mend_router_without_transformer_engine()
    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm", **place)
    block.layer_norm = RMSNorm
    for spec in block.layer_specs:
        layer = spec.submodules
        layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
        layer.self_attention.submodules.core_attention = PlainAttention
        if config.qk_layernorm:
            layer.self_attention.submodules.q_layernorm = RMSNorm
            layer.self_attention.submodules.k_layernorm = RMSNorm
        if is_of_experts(layer):
            # Transformer Engine has this norm on its own here, too: checkpoints of both kinds of layers interchange.
            layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return block
