"""Reduces the reports of a step's micro-batches over the job, and tells whether a number was not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_tropd.numbers.flags import STAGES, Finding, count_flags
from megatron_tropd.objective.result import Extremes, TokenDetails
from megatron_tropd.objective.token_statistics import summarise
from megatron_tropd.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class Limits:
    """What a step may not exceed; beyond it there is no update."""

    loss: float = math.inf  # of the mean loss, in absolute value
    grad_norm: float = math.inf


@dataclass
class StepResult:
    """Metrics of one step, reduced over the whole job; the same on every data-parallel rank of the last stage."""

    metrics: dict[str, float | list[int]] = field(default_factory=dict)  # a list is a histogram
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    details: TokenDetails | None = None  # [b, s] of this rank's batch
    # The following are the same on all ranks, but for the findings.
    loss: float = 0.0  # in absolute value; infinite where it is no number
    bad_tokens: list[int] = field(default_factory=list)  # by stage, of number_flags.STAGES
    num_loss_tokens: int = 0  # of the global batch
    # Why there was no update: one of STAGES, "loss spike", "gradient spike", "overflow", "no tokens".
    problem: str | None = None
    findings: list[Finding] = field(default_factory=list)  # this rank's part of the problem
    loss_scale: float | None = None  # of float16, after the step

    @property
    def first_bad_stage(self) -> str | None:
        """The first stage with a token that is not finite."""
        return next((stage for stage, count in zip(STAGES, self.bad_tokens, strict=False) if count), None)


def reduce_reports(reports: list[dict[str, Any]], groups: ParallelGroups, extremes: Extremes) -> StepResult:
    """Reduce the micro-batches' reports in two small collectives, of the last stage and of all ranks.

    `sums` (name -> (sum, count)) become means over the global batch, whatever the layout; `counts` (name -> [bins])
    become what token_statistics.summarise reads off them; `extremes` name the reports' `maxima` and `minima`. Stages
    without the output layer have no reports and learn of the loss and of tokens that are not finite alone.
    """
    names = (*extremes.maxima, *extremes.minima)
    shared = torch.full((len(names) + len(STAGES) + 2,), -torch.inf, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage:
        sums = _stack(reports, "sums", lambda values: torch.stack([torch.stack(v) for v in values]).sum(0))
        flags = count_flags([report["flags"] for report in reports])
        counts = _stack(reports, "counts", lambda values: torch.stack(values).sum(0))
        parts = [torch.stack(list(sums.values())).flatten(), flags, *counts.values()]
        packed = torch.cat(parts)  # [2 x metrics + stages + bins]
        torch.distributed.all_reduce(packed, group=groups.dp_cp)
        means, flags, *bins = packed.split([len(part) for part in parts])
        means = means.view(-1, 2)
        highest = _stack(reports, "maxima", lambda values: torch.stack(values).amax(0))
        lowest = _stack(reports, "minima", lambda values: torch.stack(values).amin(0))
        found = [*(highest[name] for name in extremes.maxima), *(-lowest[name] for name in extremes.minima)]
        loss, tokens = means[list(sums).index("loss")]
        shared = torch.stack([*found, *flags, (loss / tokens.clamp(min=1)).abs(), tokens])
        shared.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
    *values, loss, tokens = shared.tolist()
    bad_tokens = [int(value) for value in values[len(names) :]]
    result = StepResult(loss=loss, bad_tokens=bad_tokens, num_loss_tokens=int(tokens))
    if groups.is_last_stage:
        result.metrics |= summarise({name: part.tolist() for name, part in zip(counts, bins, strict=True)})
        largest = dict(zip(names, values, strict=False))
        largest |= {name: -largest[name] for name in extremes.minima}
        _fill(result, list(sums), means.tolist(), largest)
    return result


def _fill(result: StepResult, names: list[str], means: list[list[float]], extremes: dict[str, float]) -> None:
    for name, (total, count) in zip(names, means, strict=True):
        if count or name == "loss":
            result.metrics[name] = total / max(count, 1)
    for name, value in extremes.items():
        if abs(value) != math.inf:  # no token of that kind anywhere
            result.metrics[name] = value


def _stack(reports: list[dict[str, Any]], part: str, combine: Any) -> dict[str, torch.Tensor]:
    def as_double(value: Any) -> Any:
        return tuple(v.double() for v in value) if isinstance(value, tuple) else value.double()

    return {name: combine([as_double(r[part][name]) for r in reports]) for name in reports[0][part]}
