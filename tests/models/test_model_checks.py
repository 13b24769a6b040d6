"""Layouts that a model's sizes do not allow: refused in one line, whose sizes are then really accepted."""

import ast
import re
from dataclasses import replace

import pytest
from transformers import LlamaConfig, MixtralConfig

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models.checks import check_sizes
from megatron_tropd.parallel.layout import divisors

TP, PP, VPP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline"))
FIRST, LAST = (f"num_layers_in_{end}_pipeline_stage" for end in ("first", "last"))
EP, ETP, SP = "expert_model_parallel_size", "expert_tensor_parallel_size", "sequence_parallel"

SIZES = {"hidden_size": 48, "num_attention_heads": 24, "num_key_value_heads": 8, "intermediate_size": 100}
LLAMA = LlamaConfig(num_hidden_layers=12, **SIZES)
MIXTRAL = MixtralConfig(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8, num_local_experts=6)

# Model, layout, the key to which what the error names is given, the sizes that it must name.
WITH_REMEDY = [
    (LLAMA, {TP: 3}, TP, [1, 2, 4]),
    (LLAMA, {TP: 8}, TP, [1, 2, 4]),
    (LLAMA, {PP: 5}, PP, [1, 2, 3, 4, 6, 12]),
    (LLAMA, {PP: 2, VPP: 4}, VPP, [2, 3, 6]),
    (LLAMA, {PP: 2, VPP: 2, FIRST: 3}, VPP, [3]),
    (MIXTRAL, {EP: 4}, EP, [1, 2, 3, 6]),
    (MIXTRAL, {TP: 2, SP: True, ETP: 3}, ETP, [1, 2]),
]
# Model, layout, what must be said.
WITHOUT = [
    (LLAMA, {PP: 2, FIRST: 12}, r"first_pipeline_stage=12 leave 0 of the model's 12 layers .* at most 11 in all"),
    (LLAMA, {PP: 4, FIRST: 6, LAST: 5}, r"=6 and student.num_\w+=5 leave 1 of the .* 12 layers to 2 .* at most 10 in"),
    (LLAMA, {PP: 2, FIRST: 5, LAST: 5}, r"stages of 5 and 5 layers do not make the model's 12"),
    (LLAMA, {FIRST: 3}, r"num_layers_in_first_pipeline_stage needs student.pipeline_model_parallel_size of at least 2"),
    (LLAMA, {PP: 2, VPP: 2, FIRST: 1}, r"=2 does not divide the 1 and 11 layers of a pipeline stage; use null"),
    (LLAMA, {PP: 2, FIRST: 3, "account_for_loss_in_pipeline_split": True}, r"contradict each other; keep one"),
    (LLAMA, {EP: 2}, r"expert_model_parallel_size=2, but a llama model has no experts; remove it"),
    (MIXTRAL, {TP: 2}, r"needs student.sequence_parallel=true"),
]


def refusal(model, layout) -> str:
    with pytest.raises(UserError) as refused:
        check_sizes(model, ModelConfig(**layout), "student")
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(("model", "layout", "key", "sizes"), WITH_REMEDY)
def test_the_sizes_that_an_error_names_are_accepted(model, layout, key, sizes):
    message = refusal(model, layout)
    assert f"student.{key}={layout[key]} does not divide " in message
    assert ast.literal_eval(re.search(r"one of (\[.*?\])", message)[1]) == sizes
    for size in sizes:
        check_sizes(model, replace(ModelConfig(**layout), **{key: size}), "student")


@pytest.mark.parametrize(("model", "layout", "said"), WITHOUT)
def test_other_contradictions_are_named(model, layout, said):
    assert re.search(said, refusal(model, layout))


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
