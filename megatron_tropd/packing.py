"""How many tokens a micro-batch may hold: read by training, and by a plan that touches no device."""

from __future__ import annotations

from megatron_tropd.config import Recipe


def micro_batch_budget(recipe: Recipe, longest_prompt: int, on_cuda: bool) -> int | None:
    """Return the tokens up to which sequences are packed into a micro-batch; None: padded rows instead.

    `training.max_tokens_per_micro_batch=auto` packs on CUDA, into the tokens of micro_batch_size sequences of the
    longest possible length: a packed micro-batch never needs more memory than the padded one that it replaces.

    Args:
        recipe: its `training.*` and `rollout.max_new_tokens`.
        longest_prompt: tokens of the longest prompt.
        on_cuda: whether the models run on CUDA devices.
    """
    budget = recipe.training.max_tokens_per_micro_batch
    if budget != "auto":
        return budget
    longest = longest_prompt + recipe.rollout.max_new_tokens
    return recipe.training.micro_batch_size * longest if on_cuda else None
