"""The tokens of a packed micro-batch: what the recipe says, or what never needs more memory than padding."""

import pytest

from megatron_tropd.parallel.packing import micro_batch_budget
from megatron_tropd.recipe import load_recipe

LENGTHS = ["rollout.max_new_tokens=100", "training.micro_batch_size=3"]


@pytest.mark.parametrize(
    ("value", "fused", "budget"),
    [(None, True, 3 * 120), (None, False, None), ("auto", True, 3 * 120), ("null", True, None), ("500", False, 500)],
)
def test_packing_is_the_default_with_transformer_engine(value, fused, budget):
    options = [] if value is None else [f"training.max_tokens_per_micro_batch={value}"]
    assert micro_batch_budget(load_recipe(None, [*LENGTHS, *options]), 20, fused) == budget
