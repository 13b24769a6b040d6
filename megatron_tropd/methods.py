"""The objectives by name: the only list of them, each with what it computes and when to use it.

No torch here, so that recipes, help and checks read it at once. The formulas are in objective/objectives.py. To add a
method, add its entry here and its formula there; help, the recipe's check and the README's table follow from the entry.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """The definition of a name; None where the recipe's key decides or where the part does not apply."""

    what: str = ""  # the loss, in half a sentence
    when: str = ""  # when one uses it
    gated: bool = True  # part A; without it every student token is in the trust region
    outlier: str | None = None  # part B, fixed by the name; None: objective.outlier, default fkl
    guided: bool = False  # part C
    data: bool = False  # cross-entropy on given responses; no rollouts, no teacher
    divergence: str | None = None  # exact, over the whole vocabulary, in place of K1: of kernels.full_divergence
    everywhere: bool = False  # part B's loss on every token, in place of part A
    clipped: bool = False  # PPO's clipped ratio to the rollout's policy in K1, in place of an importance weight
    returns: bool = False  # advantages are returns of whole responses (objective/policy_gradient.py)
    uncertain: bool = False  # adds the top-k forward KL where the teacher's entropy exceeds objective.entropy_above
    floored: bool = False  # rewards are at least log(lambda / (1 - lambda)), lambda being objective.mixture
    selects: str | None = None  # the loss is on tokens of high "entropy", or in "phases" on those of the recipe's masks
    topk: int = 64  # default of objective.topk


METHODS: dict[str, Method] = {
    "tropd": Method(
        "K1 inside the trust region, top-k forward KL outside, teacher prefixes",
        "the default and the paper's best: for a student much weaker than its teacher",
        guided=True,
    ),
    "tropd_mask": Method(
        "as tropd, but no loss outside the trust region",
        "to see what the forward KL on outliers adds; needs no top-k of the teacher",
        outlier="mask",
        guided=True,
    ),
    "tropd_clip": Method(
        "as tropd, but K1 with a floored advantage outside the trust region",
        "where only the sampled token's log-prob of the teacher is known",
        outlier="clip",
        guided=True,
    ),
    "fkl_outlier": Method(
        "tropd without teacher prefixes",
        "where there are no teacher responses to the prompts",
        outlier="fkl",
    ),
    "mask_outlier": Method(
        "tropd_mask without teacher prefixes", "the cheapest trust region: one log-prob per token", outlier="mask"
    ),
    "clip_outlier": Method(
        "tropd_clip without teacher prefixes", "as mask_outlier, with a bounded pull on outliers", outlier="clip"
    ),
    "opd": Method(
        "K1 on every token",
        "the plain on-policy baseline, for a student that is already close to its teacher",
        gated=False,
    ),
    "entropy_opd": Method(
        "K1 on the share of tokens with the student's highest entropies",
        "to learn at forks only; a comparison of the paper's, and a second forward pass per step",
        gated=False,
        selects="entropy",
    ),
    "fkl_topk": Method(
        "top-k forward KL on every token",
        "the paper's negative control: its training collapses",
        gated=False,
        outlier="fkl",
        everywhere=True,
    ),
    "eopd": Method(
        "PPO-clipped K1 on every token, plus top-k forward KL where the teacher is uncertain (arXiv 2603.07079)",
        "to keep the teacher's diversity at forks; a comparison of the paper's",
        gated=False,
        clipped=True,
        uncertain=True,
        topk=16,
    ),
    "reopold": Method(
        "K1 with floored rewards: first on tokens above the floor, later on uncertain ones (REOPOLD, arXiv 2603.11137)",
        "where strongly negative rewards end exploration early; a comparison of the paper's",
        gated=False,
        floored=True,
        selects="phases",
    ),
    "topd": Method(
        "PPO-clipped policy gradient on normalised returns of bounded rewards (TOP-D, arXiv 2607.04751)",
        "where later tokens should count for earlier ones; needs several responses per prompt",
        gated=False,
        clipped=True,
        returns=True,
    ),
    "rkl_full": Method(
        "the exact reverse KL of whole distributions",
        "where the variance of K1 hurts; needs the teacher's hidden states",
        gated=False,
        divergence="reverse_kl",
    ),
    "fkl_full": Method(
        "the exact forward KL of whole distributions",
        "to cover all that the teacher says; needs the teacher's hidden states",
        gated=False,
        divergence="forward_kl",
    ),
    "jsd": Method(
        "the exact generalized Jensen-Shannon divergence",
        "GKD's compromise between the two; objective.beta is the teacher's weight",
        gated=False,
        divergence="jsd",
    ),
    "sft": Method(
        "cross-entropy on the data's own responses",
        "a start before distillation; needs no teacher",
        gated=False,
        data=True,
    ),
    "seqkd": Method(
        "cross-entropy on the teacher's responses",
        "the off-policy baseline; write the responses with `megatron-tropd generate`",
        gated=False,
        data=True,
    ),
}


def trains_on_data(name: str) -> bool:
    """Whether an objective learns from given responses, without rollouts and without a teacher model."""
    return METHODS[name].data


def is_guided(name: str) -> bool:
    """Whether an objective lets responses begin with a prefix of the teacher's."""
    return METHODS[name].guided


def method_table() -> str:
    """Return a line per objective: name, loss, and when to use it."""
    width = max(map(len, METHODS))
    return "\n".join(
        f"  {name:{width}}  {method.what}\n  {'':{width}}    {method.when}" for name, method in METHODS.items()
    )
