"""Selection of tokens: which of the student's tokens a loss is on, of the whole global batch, and their weights.

    entropy    the share beta of the student's tokens with its highest entropies      (entropy_opd; reopold, refinement)
    reward     tokens with l_T(x) - l_rollout(x) >= log(lambda / (1 - lambda))        (reopold, exploration)

The mean is over the selected tokens. Megatron divides by the number N of all loss tokens, so each of the n selected
ones weighs N / n, and the others 0. The choice is made once per step, before the batch is cut into micro-batches and
shares: it is the same under every parallel layout.
Not certain of REOPOLD: its text was read through summaries and two implementations. They agree on the floor, on both
masks and on the mean over selected tokens. They differ on beta (0.2 or 0.5: objective.entropy_share) and leave the
end of exploration open (objective.exploration_steps; half of the training here).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_tropd.config import ObjectiveConfig


def select_tokens(
    by: str,
    teacher_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    kept: torch.Tensor,
    config: ObjectiveConfig,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Return which [b, s] of the `kept` tokens are selected `by` "entropy" or "reward"; the rest as below."""
    if by == "reward":
        return best_rewarded(teacher_logprobs, old_logprobs, kept, reward_floor(config.mixture))
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
    if not values.numel():
        return kept
    return kept & (entropy >= values.topk(max(number, 1), sorted=False).values.amin())


@torch.no_grad()
def best_rewarded(
    teacher_logprobs: torch.Tensor, old_logprobs: torch.Tensor, kept: torch.Tensor, floor: float
) -> torch.Tensor:
    """Return [b, s] bool: the `kept` tokens whose reward, log pi_T - log pi of the rollout, is at least `floor` nats.

    The rollout's log-probs stand for the student's, which they are to rounding before the update.

    Args:
        teacher_logprobs: [b, s]; a token that is ruled out (-inf) is not selected.
        old_logprobs: [b, s].
        kept: [b, s] bool.
        floor: see `reward_floor`.
    """
    return kept & (teacher_logprobs - old_logprobs >= floor)  # false of NaN, where both are -inf


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


def reward_floor(mixture: float) -> float:
    """Return log(lambda / (1 - lambda)) in nats: -1.39 at 0.2. REOPOLD's bound on rewards (arXiv 2603.11137, eq. 7)."""
    return math.log(mixture / (1 - mixture))


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
