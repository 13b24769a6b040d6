"""Refuses layouts that a model's sizes do not allow, naming the divisors that would work.

check_sizes(load_hf_config(path), recipe.student, "student")
"""

from __future__ import annotations

import math
from typing import Any

from megatron_tropd.config import ModelConfig
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.parallel.layout import divisors, expert_tensor_parallel_size
from megatron_tropd.types import UserError

UNEVEN_STAGES = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def check_sizes(hf_config: Any, model: ModelConfig, role: str) -> None:
    """Refuse a layout that the model's sizes do not allow, naming divisors that would work."""
    heads, ffn = (hf_config.num_attention_heads, hf_config.num_key_value_heads), hf_config.intermediate_size
    tp = model.tensor_model_parallel_size
    if any(count % tp for count in (*heads, ffn)):
        raise UserError(
            f"{role}.tensor_model_parallel_size={tp} does not divide all of the model's {heads[0]} attention heads, "
            f"{heads[1]} key/value heads and MLP's width of {ffn}; use one of {divisors(math.gcd(*heads, ffn))}."
        )
    _check_stages(hf_config.num_hidden_layers, model, role)
    _check_experts(hf_config, model, role)


def _check_experts(hf_config: Any, model: ModelConfig, role: str) -> None:
    experts, ep, etp = experts_of(hf_config), model.expert_model_parallel_size, expert_tensor_parallel_size(model)
    if experts is None:
        if ep > 1 or model.expert_tensor_parallel_size:
            key = "expert_model_parallel_size" if ep > 1 else "expert_tensor_parallel_size"
            raise UserError(
                f"{role}.{key}={getattr(model, key)}, but a {hf_config.model_type} model has no experts; remove it."
            )
        return
    if role == "student" and model.tensor_model_parallel_size > 1 and not model.sequence_parallel:
        raise UserError(
            f"student.tensor_model_parallel_size={model.tensor_model_parallel_size} of a model with experts needs "
            "student.sequence_parallel=true: Megatron requires it for MoE with tensor parallelism. Set it."
        )
    if experts.count % ep:
        raise UserError(
            f"{role}.expert_model_parallel_size={ep} does not divide the model's {experts.count} experts; use one of "
            f"{divisors(experts.count)}."
        )
    if experts.ffn % etp:
        raise UserError(
            f"{role}.expert_tensor_parallel_size={etp} does not divide the experts' width of {experts.ffn}; use one of "
            f"{[d for d in divisors(experts.ffn) if d <= model.tensor_model_parallel_size]}."
        )


def _check_stages(layers: int, model: ModelConfig, role: str) -> None:
    """Refuse layers that do not fall evenly on the pipeline stages whose number of layers is not given."""
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    given = {key: getattr(model, key) for key in UNEVEN_STAGES[:2] if getattr(model, key) is not None}
    counted = [key for key in UNEVEN_STAGES[2:] if getattr(model, key)]
    if given and counted:
        raise UserError(f"{role}.{next(iter(given))} and {role}.{counted[0]} contradict each other; keep one of them.")
    if (given or counted) and pp == 1:
        raise UserError(
            f"{role}.{[*given, *counted][0]} needs {role}.pipeline_model_parallel_size of at least 2, and it is 1."
        )
    if not pp - len(given):
        if sum(given.values()) != layers:
            raise UserError(
                f"{role}: stages of {' and '.join(map(str, given.values()))} layers do not make the model's {layers}."
            )
        return
    left, stages = layers - sum(given.values()) + len(counted), pp - len(given)
    if given and left < stages:
        raise UserError(
            f"{' and '.join(f'{role}.{key}={count}' for key, count in given.items())} leave {max(left, 0)} of the "
            f"model's {layers} layers to {stages} other stage(s); give at most {layers - stages} in all."
        )
    what = f"the model's {layers} layers" if left == layers else f"the {left} layers left to {stages} stages"
    if left < stages or left % stages:
        raise UserError(
            f"{role}.pipeline_model_parallel_size={pp} does not divide {what}; use one of {divisors(layers)}, or give "
            f"the stages unequal numbers with {role}.{UNEVEN_STAGES[0]} and {UNEVEN_STAGES[1]}."
        )
    counts = sorted({left // stages, *given.values()})
    if any(count % vpp for count in counts):
        allowed = divisors(math.gcd(*counts))[1:]
        raise UserError(
            f"{role}.virtual_pipeline_model_parallel_size={vpp} does not divide the {' and '.join(map(str, counts))} "
            f"layers of a pipeline stage; use {f'one of {allowed} or ' if allowed else ''}null."
        )
