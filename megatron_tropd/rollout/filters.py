"""Finds responses that teach little: cut, repeating, empty or written twice; the recipe says what becomes of them.

    verdicts = judge(rollouts, recipe.rollout)
    batch = pad_rollouts(rollouts, dropped=verdicts.dropped, weights=verdicts.weights)

`drop`: no token of the response has a loss, nor counts in the mean. `mask`: its tokens count with a loss of zero, so
the others weigh no more than before. `downweight`: its losses are multiplied by rollout.downweight. A response that
several filters meet gets the strongest. Responses that a teacher's prefix made whole are the teacher's, and meet none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_tropd.config import RolloutConfig
from megatron_tropd.types import Rollouts

FILTERS = ("truncated", "repeating", "empty", "duplicate")
_PRIME = np.uint64(0x100000001B3)  # FNV's: n-grams are compared by a polynomial in it, modulo 2^64


@dataclass(frozen=True)
class Verdicts:
    """What the filters found, one entry per response; empty lists where no filter is on."""

    dropped: list[bool]
    weights: list[float]  # of the losses: 0 where masked, 1 where no filter met the response
    counts: dict[str, int]  # responses that each filter met; only of filters that are on
    filtered: int = 0  # responses that any met


def judge(rollouts: Rollouts, config: RolloutConfig) -> Verdicts:
    """Return what becomes of each response; a filter looks at this replica's rollouts, all samples of its prompts.

    Args:
        rollouts: the step's.
        config: `rollout.*` of the recipe.
    """
    actions = {name: getattr(config, f"on_{name}") for name in FILTERS}
    actions = {name: action for name, action in actions.items() if action != "keep"}
    if not actions:
        return Verdicts([], [], {})
    own = [i for i, logprobs in enumerate(rollouts.logprobs) if logprobs]  # the student wrote some of it
    met = {name: _FIND[name](rollouts, own, config) for name in actions}
    dropped, weights = [False] * len(rollouts), [1.0] * len(rollouts)
    for name, action in actions.items():
        for i in met[name]:
            dropped[i] = dropped[i] or action == "drop"
            weights[i] = min(weights[i], config.downweight if action == "downweight" else 0.0)
    counts = {name: len(found) for name, found in met.items()}
    return Verdicts(dropped, weights, counts, filtered=len(set().union(*met.values())))


def repetition(tokens: list[int], n: int) -> float:
    """Return the share of a text's n-grams that occurred in it before, in [0, 1); 0 where it has no n-gram.

    Args:
        tokens: ids.
        n: at least 1.
    """
    number = len(tokens) - n + 1
    if number < 1:
        return 0.0
    ids = np.asarray(tokens, dtype=np.uint64) + np.uint64(1)
    hashes = np.zeros(number, dtype=np.uint64)
    for offset in range(n):
        hashes = hashes * _PRIME + ids[offset : offset + number]
    return 1.0 - len(np.unique(hashes)) / number


def _written(rollouts: Rollouts, i: int) -> list[int]:
    """Return the student's own tokens of response i."""
    return rollouts.tokens[i][rollouts.prompt_lengths[i] + rollouts.prefix_lengths[i] :]


def _truncated(rollouts: Rollouts, own: list[int], config: RolloutConfig) -> set[int]:
    return {i for i in own if rollouts.finish_reasons[i] == "length"}


def _repeating(rollouts: Rollouts, own: list[int], config: RolloutConfig) -> set[int]:
    n, most = config.repetition_ngram, config.repetition_above
    return {i for i in own if repetition(_written(rollouts, i), n) > most}


def _empty(rollouts: Rollouts, own: list[int], config: RolloutConfig) -> set[int]:
    return {i for i in own if not rollouts.prefix_lengths[i] and not rollouts.texts[i].strip()}


def _duplicate(rollouts: Rollouts, own: list[int], config: RolloutConfig) -> set[int]:
    """Responses, prefix included, that an earlier sample of the same prompt has, too."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    found = set()
    for i in own:
        response = (rollouts.prompts[i].index, tuple(rollouts.tokens[i][rollouts.prompt_lengths[i] :]))
        if response in seen:
            found.add(i)
        seen.add(response)
    return found


_FIND = {"truncated": _truncated, "repeating": _repeating, "empty": _empty, "duplicate": _duplicate}
