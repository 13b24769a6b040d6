"""The token budget of a micro-batch, for training and for plans without a device."""

from __future__ import annotations

from megatron_tropd.config import Recipe


def micro_batch_budget(recipe: Recipe, longest_prompt: int, fused: bool) -> int | None:
    """Return the tokens up to which sequences are packed into a micro-batch; None: padded rows instead.

    `training.max_tokens_per_micro_batch=auto` packs where Transformer Engine is, into the tokens of micro_batch_size
    sequences of the longest possible length: a packed micro-batch never needs more memory than the padded one that it
    replaces. Megatron's own layers rotate packed sequences one by one, which short responses do not make up for: scores
    and update of sixteen sequences of 140 tokens, 4 layers of an 8B model, took 1.6 times as long on an H200.

    Args:
        recipe: its `training.*` and `rollout.max_new_tokens`.
        longest_prompt: tokens of the longest prompt.
        fused: whether the models are built of Transformer Engine's layers.
    """
    budget = recipe.training.max_tokens_per_micro_batch
    if not isinstance(budget, str):  # "auto"
        return budget
    longest = longest_prompt + recipe.rollout.max_new_tokens
    return recipe.training.micro_batch_size * longest if fused else None
