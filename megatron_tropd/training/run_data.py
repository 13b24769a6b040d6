"""The data of a training run: prompts, problems, held-out text and guidance, read and checked before any model.

data = load_run_data(recipe, tokenizer, endings, objective, context=hf_config.max_position_embeddings)
data.source.next(128)
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.evaluation.accuracy import load_problems
from megatron_tropd.grading.grader import check_pattern
from megatron_tropd.objective.objectives import Objective
from megatron_tropd.prompts.data_report import understood
from megatron_tropd.prompts.guidance import Guidance
from megatron_tropd.prompts.prompt_set import PromptSet
from megatron_tropd.prompts.source import PromptSource
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.training.held_out import load_held_out
from megatron_tropd.types import Prompt

logger = logging.getLogger(__name__)


@dataclass
class RunData:
    """What a run draws from and is measured on."""

    source: PromptSource
    problems: list[Prompt]
    held_out: list[Prompt]
    guidance: Guidance
    longest_prompt: int  # tokens; of a large set, those of its greatest rows


def load_run_data(
    recipe: Recipe, tokenizer: Tokenizer, endings: Endings, objective: Objective, context: int
) -> RunData:
    """Read and check all data that `recipe` names.

    Args:
        recipe: its data.*, guidance.* and evaluation.*.
        tokenizer: the student's.
        endings: which EOS follows a teacher's response.
        objective: determines whether teacher responses are needed.
        context: the student's longest sequence, in tokens.

    Raises:
        UserError: naming file and row, or the key.
    """
    limit = longest_prompt(recipe, context)
    prompts = open_prompts(recipe, tokenizer, limit)
    prompts.problems.raise_if_any(length_remedy(recipe, context, limit))
    if not len(prompts):
        raise UserError(
            f"data.prompts={recipe.data.prompts}: all {prompts.too_long} prompts have more than the {limit} tokens "
            f"allowed and were skipped (data.skip_long_prompts); {length_remedy(recipe, context, limit)}."
        )
    for line in understood(prompts):
        logger.info("%s", line)
    problems = load_problems_of(recipe, tokenizer, context)
    held_out = _load_held_out(recipe, tokenizer, limit)
    guidance = Guidance(
        recipe.guidance,
        recipe.training.steps,
        tokenizer,
        max_tokens=recipe.rollout.max_new_tokens,
        whole_response=not objective.needs_rollout,
        enabled=objective.uses_guidance,
        endings=endings,
        columns=recipe.data.columns,
    )
    guidance.check(prompts.ids_without_response, len(prompts))
    _check_budget(recipe, prompts.longest)
    return RunData(_open_source(recipe, prompts), problems, held_out, guidance, prompts.longest)


def open_prompts(recipe: Recipe, tokenizer: Tokenizer | None, limit: int | None) -> PromptSet:
    """Open data.prompts; `limit` is the longest prompt in tokens."""
    budget = recipe.training.max_tokens_per_micro_batch
    exact = budget - recipe.rollout.max_new_tokens if isinstance(budget, int) else None
    return PromptSet(recipe.data.prompts, tokenizer, data=recipe.data, max_tokens=limit, exact_above=exact)


def longest_prompt(recipe: Recipe, context: int) -> int:
    """Return the longest prompt allowed, in tokens; UserError if the response takes the whole context."""
    room = context - recipe.rollout.max_new_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens={recipe.rollout.max_new_tokens} leaves no room for a prompt in the student's "
            f"context of {context} tokens (max_position_embeddings); lower it below {context}"
        )
    return min(room, recipe.data.max_prompt_tokens or room)


def prompt_limit(recipe: Recipe) -> tuple[int | None, str]:
    """Return the longest prompt in tokens as far as it is known without a model, and where it is from; None, "" if not.

    The student's context is read from the config.json of student.hf_path, if there is one.
    """
    asked, new = recipe.data.max_prompt_tokens, recipe.rollout.max_new_tokens
    file = Path(recipe.student.hf_path or "") / "config.json"
    context = json.loads(file.read_text()).get("max_position_embeddings") if file.is_file() else None
    room = context - new if isinstance(context, int) else None
    if room is not None and 0 < room < (asked or room + 1):
        return room, f"{room:,} tokens, which rollout.max_new_tokens={new} leaves of the context of {context}"
    if room is not None and room <= 0 and asked is None:
        return None, f"unknown: rollout.max_new_tokens={new} leaves nothing of the context of {context}"
    return asked, f"{asked:,} tokens (data.max_prompt_tokens)" if asked else ""


def length_remedy(recipe: Recipe, context: int, limit: int) -> str:
    """Return which keys help against prompts of more than `limit` tokens, and where that limit is from."""
    new, asked = recipe.rollout.max_new_tokens, recipe.data.max_prompt_tokens
    if asked is not None and asked == limit:
        return (
            f"raise data.max_prompt_tokens={asked} (up to {context - new}, which rollout.max_new_tokens={new} leaves "
            f"of the context of {context}), or set data.skip_long_prompts=true"
        )
    other = " can only lower the limit" if asked is None else f"={asked} is above that"
    return (
        f"lower rollout.max_new_tokens={new}, which leaves {limit} of the context of {context} tokens "
        f"(data.max_prompt_tokens{other}), or set data.skip_long_prompts=true"
    )


def _open_source(recipe: Recipe, prompts: PromptSet) -> PromptSource:
    data, parts = recipe.data, prompts.part_lengths
    entries = data.prompts if isinstance(data.prompts, list) else [data.prompts]
    if data.weights and (len(data.weights) != len(parts) or min(data.weights) <= 0):
        raise UserError(
            f"data.weights={data.weights}: expected one number above 0 for each of the {len(parts)} entries of "
            f"data.prompts ({', '.join(map(str, entries))})."
        )
    if data.weights and 0 in parts:
        raise UserError(f"data.weights: {entries[parts.index(0)]} has no usable prompt to draw; remove it.")
    return PromptSource(prompts, data.seed, data.shuffle, data.weights, parts)


def _check_budget(recipe: Recipe, longest: int) -> None:
    budget = recipe.training.max_tokens_per_micro_batch
    if isinstance(budget, int) and budget < longest + recipe.rollout.max_new_tokens:
        raise UserError(
            f"training.max_tokens_per_micro_batch={budget} cannot hold {longest} prompt tokens (the longest of "
            f"{recipe.data.prompts}) and rollout.max_new_tokens={recipe.rollout.max_new_tokens}; use at least "
            f"{longest + recipe.rollout.max_new_tokens}, or auto"
        )


def load_problems_of(recipe: Recipe, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    """Read the problems that a recipe names, none if it names none; UserError naming file and row."""
    config = recipe.evaluation
    if not config.problems:
        return []
    check_pattern(config.answer_pattern)
    room = context - (config.max_new_tokens or recipe.rollout.max_new_tokens)
    return load_problems(config.problems, tokenizer, room, recipe.data)


def _load_held_out(recipe: Recipe, tokenizer: Tokenizer, limit: int) -> list[Prompt]:
    config = recipe.evaluation
    if not config.held_out:
        return []
    return load_held_out(config.held_out, config.held_out_responses, tokenizer, limit, recipe.data)
