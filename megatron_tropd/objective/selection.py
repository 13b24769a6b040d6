"""Selection of tokens: which of the student's tokens a loss is on, of the whole global batch, and their weights.

    entropy    the share beta of the student's tokens with its highest entropies      (entropy_opd)

The mean is over the selected tokens. Megatron divides by the number N of all loss tokens, so each of the n selected
ones weighs N / n, and the others 0. The choice is made once per step, before the batch is cut into micro-batches and
shares: it is the same under every parallel layout."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_tropd.config import ObjectiveConfig


def select_tokens(
    entropy: torch.Tensor | None,
    kept: torch.Tensor,
    config: ObjectiveConfig,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return which [b, s] of the `kept` tokens are selected; the rest as below."""
    if entropy is None:
        raise ValueError(f"objective.name={config.name} needs the student's entropies here (training/entropies.py)")
    return most_uncertain(entropy, kept, config.entropy_share, group)


@torch.no_grad()
def most_uncertain(
    entropy: torch.Tensor, kept: torch.Tensor, share: float, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return [b, s] bool: of the global batch's `kept` tokens the `share` with the highest entropies; collective.

    Rounded up to whole tokens; those that equal the last one are selected, too.

    Args:
        entropy: [b, s] fp32 of the student, nats.
        kept: [b, s] bool, the tokens to choose from.
        share: in (0, 1].
        group: the data-parallel ranks, each with its own rows; None: there is but this process.
    """
    values = _of_all_ranks(entropy[kept], group)
    number = math.ceil(round(share * values.numel(), 6))  # 0.2 * 15 is a little more than 3
    if number == 0:
        return kept
    return kept & (entropy >= values.topk(number, sorted=False).values.amin())


@torch.no_grad()
def selection_weights(
    selected: torch.Tensor, kept: torch.Tensor, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Return the weights [b, s] fp32, N / n on the selected tokens and 0 elsewhere; collective.

    Args:
        selected: [b, s] bool, n in the global batch.
        kept: [b, s] bool, all N tokens that have a loss; the selected ones are among them.
        group: as in `most_uncertain`.
    """
    counts = torch.stack([kept.sum(), selected.sum()]).double()
    if group is not None:
        dist.all_reduce(counts, group=group)
    return selected * (counts[0] / counts[1].clamp(min=1)).float()


def _of_all_ranks(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the values of all ranks, [n] of each, in one tensor; the ranks' numbers of values differ."""
    if group is None or group.size() == 1:
        return values
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=values.device)
    sizes[group.rank()] = values.numel()
    dist.all_reduce(sizes, group=group)
    numbers = sizes.tolist()
    padded = values.new_zeros(max(numbers))
    padded[: values.numel()] = values
    gathered = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(gathered, padded, group=group)
    return torch.cat([part[:number] for part, number in zip(gathered, numbers, strict=True)])
