"""Intervals and pass@k against hand-computed values, and against counting all draws."""

import itertools
import math

import numpy as np
import pytest

from megatron_tropd.evaluation.intervals import interval, measure, pass_at_k


@pytest.mark.parametrize(("samples", "right"), [(1, 0), (1, 1), (4, 1), (5, 0), (5, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(samples, right):
    responses = [True] * right + [False] * (samples - right)
    for k in range(1, samples + 1):
        draws = list(itertools.combinations(responses, k))
        assert pass_at_k(np.array([right]), samples, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    n, c, k = 4096, 3, 2048
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(np.array([c]), n, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(np.array([0, n]), n, n) == 0.5


def test_measure_by_hand():
    result = measure([2, 0, 4], 4)
    assert (result["accuracy"], result["problems"]) == (0.5, 3)
    assert result["pass_at_k"] == {"1": 0.5, "2": pytest.approx((5 / 6 + 0 + 1) / 3), "4": pytest.approx(2 / 3)}
    assert list(measure([1], 6)["pass_at_k"]) == ["1", "2", "4", "6"]


def test_the_interval_is_that_of_resampled_problems():
    """Two problems, one right: the resamples' means are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    assert interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    scores = np.array([1.0] * 300 + [0.0] * 700)
    low, high = interval(scores)
    half_width = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert low == pytest.approx(0.3 - half_width, abs=0.004)
    assert high == pytest.approx(0.3 + half_width, abs=0.004)
    assert interval(scores) == (low, high)
    assert interval(np.random.default_rng(1).permutation(scores)) == (low, high)


def test_samples_of_a_problem_narrow_nothing_where_they_agree():
    assert interval(np.array([0.0, 1.0, 1.0, 0.0])) == interval(np.array([0.0, 1.0]).repeat(2))
    wide, narrow = (interval(np.array(scores)) for scores in ([0.0, 1.0] * 8, [0.5] * 16))
    assert narrow == (0.5, 0.5)
    assert wide[1] - wide[0] > 0.4


@pytest.mark.parametrize("correct", [[], [3]])
def test_without_problems_to_resample_there_is_no_interval(correct):
    result = measure(correct, 4)
    assert (result["accuracy_low"], result["accuracy_high"]) == (None, None)
    assert result["accuracy"] == (0.75 if correct else 0.0)
