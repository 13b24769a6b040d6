"""Accuracy over problems and samples: its 95 % interval, and pass@k.

The interval is a percentile bootstrap with 10,000 resamples and a fixed seed. It resamples problems, because the
samples of one problem depend on each other.

    measure([2, 0, 4], 4)  # accuracy 0.5, its interval, pass@1, @2 and @4 of three problems with four samples each
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_RESAMPLES = 10_000
_SEED = 20260609


def measure(correct: Sequence[int], samples: int) -> dict[str, Any]:
    """Return what is known of the accuracy from the number of right samples per problem, of `samples` each.

    Returns:
        accuracy (the mean over problems; 0 without problems), accuracy_low and accuracy_high (None for fewer than two
        problems), problems, and pass_at_k: {"1": ..., "2": ..., "4": ..., up to the number of samples}.
    """
    counts = np.asarray(correct, dtype=np.int64)
    low, high = interval(counts / samples)
    return {
        "accuracy": float(counts.mean() / samples) if len(counts) else 0.0,
        "accuracy_low": low,
        "accuracy_high": high,
        "problems": len(counts),
        "pass_at_k": {str(k): pass_at_k(counts, samples, k) for k in _powers(samples)},
    }


def interval(scores: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean of `scores` [problems]; (None, None) for fewer than two.

    Scores take few values, so a resample is drawn as the number of times that each value occurs.
    """
    if len(scores) < 2:
        return None, None
    values, counts = np.unique(scores, return_counts=True)
    draws = np.random.default_rng(_SEED).multinomial(len(scores), counts / len(scores), size=_RESAMPLES)
    low, high = np.quantile(draws @ values / len(scores), (0.025, 0.975))
    return float(low), float(high)


def pass_at_k(correct: np.ndarray, samples: int, k: int) -> float:
    """Return the chance that one of k samples is right, 1 - C(n-c, k) / C(n, k), the mean over problems [problems].

    The estimator is unbiased; its quotient of binomials is a product of factors of at most 1, so nothing overflows.
    """
    if not len(correct):
        return 0.0
    wrong = samples - np.asarray(correct)
    all_wrong = np.ones(len(wrong))
    for drawn in range(k):
        all_wrong *= np.maximum(wrong - drawn, 0) / (samples - drawn)
    return float(1 - all_wrong.mean())


def _powers(samples: int) -> list[int]:
    """Return 1, 2, 4, ... and the number of samples itself."""
    return sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})
