"""Hugging Face config to Megatron GPTModel: Llama (2, 3, 3.x), Qwen2 / 2.5, Qwen3, Qwen3-MoE and Mixtral.

Layer classes are chosen in mcore/layer_specs.py. Weights are not initialised here: `convert.load_model_weights` fills
every parameter.

    hf_config = load_hf_config("models/Llama-3.1-8B")
    chunks = build_model(hf_config, recipe.student, groups)     # one GPTModel per virtual pipeline stage
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import is_te_min_version

from megatron_tropd.config import ModelConfig, TeacherConfig
from megatron_tropd.huggingface.config import has_qk_norm, has_qkv_bias, head_dim, inverse_frequencies, rope_parameters
from megatron_tropd.huggingface.config import load_hf_config as load_hf_config  # users know it from here
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.machine.preflight import fp8_problem
from megatron_tropd.mcore.compat import recompute_in_training_only
from megatron_tropd.mcore.layer_specs import block_spec, uses_transformer_engine
from megatron_tropd.models.checks import UNEVEN_STAGES, check_sizes
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.layout import expert_tensor_parallel_size
from megatron_tropd.rounding import round_up
from megatron_tropd.types import UserError

_VOCAB_MULTIPLE = 128  # a shard of a multiple of it keeps matrix products aligned
# What needs Transformer Engine.
_LOCAL_LAYERS = {"apply_rope_fusion": False, "moe_grouped_gemm": False, "moe_permute_fusion": False}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Round the vocabulary up to a multiple of lcm(128, tp): all padding at the end, never per shard.

    It is the same for every tp that divides 128, so checkpoints need no adjustment between those layouts.
    """
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor_model_parallel_size)
    return round_up(vocab_size, multiple)


def transformer_config(hf_config: Any, model: ModelConfig, role: str = "model", **overrides: Any) -> TransformerConfig:
    """Translate a Hugging Face config and a layout into Megatron's TransformerConfig.

    Args:
        hf_config: from `load_hf_config`.
        model: layout and dtype.
        role: "student" or "teacher", for error messages.
        overrides: fields of TransformerConfig that go first.

    Raises:
        UserError: TP does not divide the heads or key/value heads, PP x VPP does not divide the layers, or the dtype is
            still auto.
    """
    check_sizes(hf_config, model, role)
    dtype = _dtype_of(model, role)
    fields = {
        "num_layers": hf_config.num_hidden_layers,
        "hidden_size": hf_config.hidden_size,
        "ffn_hidden_size": hf_config.intermediate_size,
        "num_attention_heads": hf_config.num_attention_heads,
        "num_query_groups": hf_config.num_key_value_heads,
        "kv_channels": head_dim(hf_config),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.rms_norm_eps,
        "qk_layernorm": has_qk_norm(hf_config),
        "add_bias_linear": False,
        "add_qkv_bias": has_qkv_bias(hf_config),
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        # Layout.
        "tensor_model_parallel_size": model.tensor_model_parallel_size,
        "pipeline_model_parallel_size": model.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": model.virtual_pipeline_model_parallel_size,
        # Interleaved, two stages exchange activations and gradients at once: batched together they would be mixed up.
        "overlap_p2p_comm": model.virtual_pipeline_model_parallel_size is not None,
        "batch_p2p_comm": model.virtual_pipeline_model_parallel_size is None,
        "batch_p2p_sync": False,  # it would stop the device at every exchange, for the sake of old versions of torch
        **{key: getattr(model, key) for key in UNEVEN_STAGES},
        "context_parallel_size": model.context_parallel_size,
        "sequence_parallel": model.sequence_parallel,
        # loss_func returns sums and token counts: every token of the global batch weighs alike.
        "calculate_per_token_loss": True,
        # Weights are loaded, not drawn; yet Megatron marks which are sharded only where it initialises them.
        **dict.fromkeys(("init_method", "output_layer_init_method", "embedding_init_method"), _leave_unset),
        **_fp8_fields(model, role),
        **_expert_fields(hf_config, model),
        **_device_fields(),
        **recompute_fields(model.recompute, uses_transformer_engine()),
    }
    return TransformerConfig(**{**fields, **overrides})


def _dtype_of(model: ModelConfig, role: str) -> torch.dtype:
    if model.dtype not in _DTYPES:
        raise UserError(
            f"{role}.dtype={model.dtype} is open: call megatron_tropd.resolve_dtypes(recipe) before models are built, "
            f"or set it to one of {', '.join(_DTYPES)}."
        )
    return _DTYPES[model.dtype]


def build_model(
    hf_config: Any,
    model: ModelConfig,
    groups: ParallelGroups,
    *,
    training: bool = True,
    role: str = "model",
    use_transformer_engine: bool | None = None,
    **overrides: Any,
) -> list[GPTModel]:
    """Build this rank's model chunks on its device, weights unset.

    Args:
        hf_config: from `load_hf_config`.
        model: layout and dtype.
        groups: process groups of that layout.
        training: train mode; else eval mode without gradients.
        role: for error messages.
        use_transformer_engine: False: build Megatron's local layers, without fp8; default: what the machine has.
        overrides: fields of TransformerConfig that go first.

    Returns:
        One GPTModel per virtual pipeline stage (one in all without interleaving), with `true_vocab_size` set to the
        config's vocabulary; its `vocab_size` is padded.
    """
    virtual_size = model.virtual_pipeline_model_parallel_size
    if use_transformer_engine is None:
        use_transformer_engine = uses_transformer_engine()
    if not use_transformer_engine:
        overrides = {**_LOCAL_LAYERS, **overrides}
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", module=r"megatron\.core"
        )  # about Apex, which is optional, and its own defaults
        fusion = {"gradient_accumulation_fusion": training and _fuses_gradient_accumulation()}
        config = transformer_config(hf_config, model, role, **{**fusion, **overrides})
        stages = range(virtual_size) if virtual_size else [None]
        chunks = [_build_chunk(hf_config, config, groups, stage, use_transformer_engine) for stage in stages]
    for chunk in chunks:
        chunk.true_vocab_size = hf_config.vocab_size
        chunk.to(groups.device)
        chunk.train(training)
        chunk.requires_grad_(training)
        recompute_in_training_only(chunk)
    return chunks


def _build_chunk(
    hf_config: Any,
    config: TransformerConfig,
    groups: ParallelGroups,
    vp_stage: int | None,
    use_transformer_engine: bool,
) -> GPTModel:
    virtual_size = config.virtual_pipeline_model_parallel_size or 1
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, groups.pp_rank, vp_stage, use_transformer_engine),
        vocab_size=padded_vocab_size(hf_config.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=hf_config.max_position_embeddings,
        pre_process=groups.is_first_stage and vp_stage in (None, 0),
        post_process=groups.is_last_stage and vp_stage in (None, virtual_size - 1),
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
        position_embedding_type="rope",
        rotary_base=rope_parameters(hf_config)["rope_theta"],
        pg_collection=groups.collection,
        vp_stage=vp_stage,
    )
    scaled = inverse_frequencies(hf_config)
    if scaled is not None:
        chunk.rotary_pos_emb.inv_freq = scaled.to(chunk.rotary_pos_emb.inv_freq.device)
    return chunk


def _leave_unset(weight: torch.Tensor) -> torch.Tensor:
    return weight


def _fp8_fields(model: ModelConfig, role: str) -> dict[str, Any]:
    """Recipes that scale by the tensors at hand: `delayed` ones would carry a history from pass to pass."""
    problem = fp8_problem(role, model, uses_transformer_engine())
    if problem:
        raise UserError(problem)
    if model.fp8 is None:
        return {}
    # Copies of weights in 8 bits are kept from micro-batch to micro-batch, on the device: not of offloaded ones.
    offloaded = isinstance(model, TeacherConfig) and model.offload
    return {"fp8": model.fp8, "fp8_recipe": model.fp8_recipe, "disable_parameter_transpose_cache": offloaded}


def _expert_fields(hf_config: Any, model: ModelConfig) -> dict[str, Any]:
    experts = experts_of(hf_config)
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_router_topk": experts.per_token,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_layer_freq": [int(sparse) for sparse in experts.layers],
        "moe_router_pre_softmax": experts.softmax_first,
        "moe_router_dtype": "fp32",
        # The teacher's distribution is the whole target: no loss of the router's own, and no token is dropped.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": uses_transformer_engine(),
        "moe_permute_fusion": _fuses_permutation(),
        "expert_model_parallel_size": model.expert_model_parallel_size,
        "expert_tensor_parallel_size": expert_tensor_parallel_size(model),
    }


def _fuses_permutation() -> bool:
    """Whether Transformer Engine sorts tokens by expert in one kernel."""
    is_there = uses_transformer_engine() and importlib.util.find_spec("transformer_engine") is not None
    return is_there and is_te_min_version("2.1.0")


def _device_fields() -> dict[str, Any]:
    has_cuda = torch.cuda.is_available()
    return {
        "use_cpu_initialization": not has_cuda,
        "bias_activation_fusion": has_cuda,
        "apply_rope_fusion": uses_transformer_engine(),
        "masked_softmax_fusion": False,
    }


def _fuses_gradient_accumulation() -> bool:
    """Whether matrix products can add weights' gradients to the fp32 ones themselves: Apex has the kernel for it."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def recompute_fields(recompute: str | None, fused: bool) -> dict[str, Any]:
    """Return the fields of TransformerConfig for activation recomputation.

    Args:
        recompute: None, "selective" or "full".
        fused: layers are Transformer Engine's, whose attention stores no probabilities: MLPs and experts store the
            most. Megatron's local attention stores more than anything else.
    """
    if recompute is None:
        return {}
    if recompute == "selective":
        modules = ["mlp", "moe"] if fused else ["core_attn"]
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
