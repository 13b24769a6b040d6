"""Statistics of a step's tokens beyond means: histograms, their quantiles, and the gradient share per kind of token.

Everything is a sum over tokens, so micro-batches and ranks add up (step_report.reduce_reports), and the result is the
same under every parallel layout. Quantiles come from the summed histograms, with an error below the width of a bin.

    counts = token_histograms({"rho": (gate.rho, kept), ...})    # per micro-batch, on the device
    summarise(summed)       # {"rho_histogram": [...], "advantage_p50": 0.1, "logprob_mismatch_p99": 0.02, ...}
"""

from __future__ import annotations

from functools import cache

import torch

RHO_BINS = 20  # equal ones over [0, 1]; the last includes 1
QUANTILES = {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}
_PER_DECADE = 12  # a bin is 21 % wide
_ADVANTAGE = (1e-3, 1e2)  # nats; smaller ones lie in one bin around 0, larger ones in the last
_MISMATCH = (1e-8, 1e2)


@cache
def _edges(name: str) -> list[float]:
    """Return the inner edges of a histogram's bins, ascending."""
    if name == "rho":
        return [i / RHO_BINS for i in range(1, RHO_BINS)]
    low, high = _ADVANTAGE if name == "advantage" else _MISMATCH
    steps = round(_PER_DECADE * torch.tensor(high / low).log10().item())
    positive = [low * 10 ** (i / _PER_DECADE) for i in range(steps + 1)]
    return [-edge for edge in reversed(positive)] + positive if name == "advantage" else positive


@torch.no_grad()
def token_histograms(values: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return name -> [bins] fp64 numbers of tokens, without waiting for the device.

    Args:
        values: name -> [b, s] values and [b, s] bool, the tokens that count; NaN does not. The names are rho, the
            acceptance probability; advantage, the teacher's log-probability minus the student's; and mismatch, the
            absolute difference of the log-probabilities of trainer and rollout.
    """
    return {name: _histogram(value, kept, _edges_on(name, value.device)) for name, (value, kept) in values.items()}


@cache
def _edges_on(name: str, device: torch.device) -> torch.Tensor:
    """Return `_edges` on a device, copied there once: a copy waits for all that the device has yet to do."""
    return torch.tensor(_edges(name), dtype=torch.float32, device=device)


def _histogram(values: torch.Tensor, kept: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    values = values.float()
    kept = kept & ~values.isnan()  # which sorts as if it were the largest
    # Sorting is deterministic and needs no look at the values on the host, as `bincount` and `histc` do.
    ordered = torch.where(kept, values, torch.inf).flatten().sort().values
    below = torch.searchsorted(ordered, edges)
    total = kept.sum().unsqueeze(0)
    return torch.cat([below, total]).diff(prepend=torch.zeros_like(total)).double()


def summarise(counts: dict[str, list[float]]) -> dict[str, list[int] | float]:
    """Return what is recorded of the summed histograms; nothing where no token was counted."""
    if not counts or not sum(counts["rho"]):
        return {}
    found: dict[str, list[int] | float] = {"rho_histogram": [round(n) for n in counts["rho"]]}
    for name, key in (("advantage", "advantage"), ("mismatch", "logprob_mismatch")):
        if sum(counts[name]):  # none where the teacher rules out every token
            found |= {f"{key}_{label}": _quantile(name, counts[name], share) for label, share in QUANTILES.items()}
    return found


def _quantile(name: str, counts: list[float], share: float) -> float:
    """Return the value below which `share` of the tokens lie, interpolated within its bin."""
    edges = _edges(name)
    first = edges[0] if name == "advantage" else 0.0
    bounds = [first, *edges, edges[-1]]  # what lies beyond the outermost edge counts as lying on it
    target, below = share * sum(counts), 0.0
    for count, low, high in zip(counts, bounds, bounds[1:], strict=True):
        if count and below + count >= target:
            return low + (high - low) * (target - below) / count
        below += count
    return bounds[-1]


@torch.no_grad()
def logit_gradient(coefficients: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """Return the L1 norm [...] of a loss's gradient in all the student's logits, per token.

    The loss reads log-probabilities of a few distinct ids, d loss / d log q_j = c_j, so that d loss / d logit_i is
    c_i - q_i C with C the sum of the c_j; ids that are not read have c_i = 0 and together 1 - sum q_j.

    Args:
        coefficients: [..., j] the c_j.
        logprobs: [..., j] the log q_j.
    """
    probs = logprobs.exp()
    total = coefficients.sum(-1, keepdim=True)
    rest = (1.0 - probs.sum(-1)).clamp(min=0.0)
    return (coefficients - probs * total).abs().sum(-1) + total.squeeze(-1).abs() * rest


def loss_gradient(
    loss: torch.Tensor,
    logprobs: torch.Tensor,
    kept: torch.Tensor,
    read: slice,
    repeated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the `logit_gradient` [b, s] of a loss by autograd; the graph stays. Zeros without a graph.

    Args:
        loss: [b, s], of which each token's reads its own log-probs alone.
        logprobs: [b, s, j] of which the loss was computed.
        kept: [b, s] bool, the tokens that count.
        read: which of the j the loss reads.
        repeated: [b, s, j - 1] bool, which of the others are the same id as the first.
    """
    if not (loss.requires_grad and logprobs.requires_grad):
        return torch.zeros_like(loss)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)
    student = torch.where(kept.unsqueeze(-1), logprobs[..., read], -torch.inf)
    if repeated is None:
        return logit_gradient(gradient[..., read], student)
    first, others = gradient[..., :1], gradient[..., 1:]
    is_repeated = repeated.any(-1, keepdim=True)
    coefficients = torch.cat([torch.where(is_repeated, 0.0, first), others + repeated * first], -1)
    return logit_gradient(
        coefficients, torch.cat([student[..., :1].where(~is_repeated, -torch.inf), student[..., 1:]], -1)
    )


def gradient_shares(weights: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return `gradient_share_<kind>` as (sum, sum over all kinds) of the tokens' `logit_gradient`, by kind."""
    sums = {kind: weight.sum(dtype=torch.float64) for kind, weight in weights.items()}
    total = torch.stack(list(sums.values())).sum()
    return {f"gradient_share_{kind}": (value, total) for kind, value in sums.items()}
