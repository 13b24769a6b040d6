"""What an objective returns of a micro-batch: losses, sums for means over the global batch, values of single tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from megatron_tropd.objective.trust_region import TrustGate

Total = tuple[torch.Tensor, torch.Tensor]  # a sum and the number of its items, fp64 scalars that add up


@dataclass
class TokenDetails:
    """Values of single tokens for samples and reports; all [b, s]."""

    student_logprobs: torch.Tensor
    teacher_logprobs: torch.Tensor
    gate: TrustGate


class Extremes(NamedTuple):
    """Names of values of which the whole batch's largest, or smallest, is wanted."""

    maxima: tuple[str, ...] = ()
    minima: tuple[str, ...] = ()


@dataclass
class ObjectiveResult:
    """A micro-batch's losses and statistics; name -> (sum, count) where a mean over the global batch is wanted."""

    loss: torch.Tensor  # [b, s] fp32, zero on tokens without loss
    metrics: dict[str, Total] = field(default_factory=dict)
    maxima: dict[str, torch.Tensor] = field(default_factory=dict)
    minima: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, torch.Tensor] = field(default_factory=dict)  # histograms, [bins] each
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # [b, s] by kind of token: logit_gradient
    details: TokenDetails | None = None


def weighed(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return weights * values, and 0 where the weight is 0, whatever the value; all [b, s]."""
    return torch.where(weights > 0, weights * values, 0.0)


def total(values: torch.Tensor, weights: torch.Tensor) -> Total:
    """Return the sums of `values` and of `weights`, any shapes; `values` is zero where the weight is."""
    return values.detach().sum(dtype=torch.float64), weights.sum(dtype=torch.float64)


def totals_where_known(name: str, values: torch.Tensor | None, weights: torch.Tensor) -> dict[str, Total]:
    """Return `name` with the weighed total of `values` [b, s], or nothing where there are none."""
    return {} if values is None else {name: total(weighed(weights, values), weights)}


def largest(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return the largest of the `kept` values, a scalar; -inf where none is kept."""
    return torch.where(kept, values, -torch.inf).amax()
