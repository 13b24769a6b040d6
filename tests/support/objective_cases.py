"""Every variant of every objective, and random logits with a batch of every kind of token to compute it on."""

from __future__ import annotations

import itertools

import torch

from megatron_tropd.config import ObjectiveConfig
from megatron_tropd.methods import METHODS
from megatron_tropd.types import LOSS_GUIDANCE, LOSS_NONE, LOSS_STUDENT, TeacherScores, TrainingBatch

VOCAB, PADDED, B, S, K = 61, 64, 3, 7, 6
SEED, STEP, BETA, CLIP, TAU, CAP = 11, 4, 0.3, -0.7, 0.4, 1.2
ALPHA, SAMPLES = 0.3, 100  # of topd: samples 5 and 77 answer one prompt, 900 another
EPS, ENTROPY, LAMBDA = 0.3, 2.0, 0.7  # of eopd; about half of the tokens lie above
SHARE, MIXTURE = 0.4, 0.3  # of entropy_opd and reopold
TAILS = ("truncated", "renormalized", "tail")


def variants() -> list[ObjectiveConfig]:
    """Every gate with every outlier treatment, tail and importance correction, and every method by name."""
    fixed = {"topk": K, "clip": CLIP, "gate_threshold": TAU, "importance_cap": CAP}
    fixed |= {"ppo_clip": EPS, "entropy_above": ENTROPY, "entropy_weight": LAMBDA, "alpha": ALPHA}
    fixed |= {"entropy_share": SHARE, "mixture": MIXTURE}
    gated = [
        ObjectiveConfig(name="tropd", gate=gate, outlier=outlier, tail=tail, importance=importance, **fixed)
        for gate, outlier, tail, importance in itertools.product(
            ("bernoulli", "threshold", "soft"), ("fkl", "fkl_advantage"), TAILS, ("off", "tis", "icepop")
        )
    ]
    gated += [
        ObjectiveConfig(name="tropd", gate=gate, outlier=outlier, importance=importance, **fixed)
        for gate, outlier, importance in itertools.product(
            ("bernoulli", "threshold", "soft"), ("mask", "clip"), ("off", "tis", "icepop")
        )
    ]
    masks = ({"exploration_steps": STEP + 1}, {"refinement_mask": "none"}, {"refinement_mask": "reward"})
    phases = [ObjectiveConfig(name="reopold", **mask, **fixed) for mask in masks]
    return gated + [ObjectiveConfig(name=name, **fixed) for name in METHODS] + phases


def inputs():
    """Whole logits [s, b, V] of student and teacher, and a batch with every kind of token."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(S, B, PADDED, generator=generator) for _ in range(2))
    labels = torch.randint(VOCAB, (B, S), generator=generator)
    kind = torch.tensor([[LOSS_NONE, LOSS_GUIDANCE, LOSS_GUIDANCE, *[LOSS_STUDENT] * 4]] * B, dtype=torch.int8)
    kind[1] = LOSS_STUDENT
    kind[2, 5:] = LOSS_NONE
    old = (student[..., :VOCAB].log_softmax(-1).transpose(0, 1).gather(-1, labels[..., None]))[..., 0]
    old = old + 0.4 * torch.randn(B, S, generator=generator)
    positions = torch.arange(S).expand(B, S).contiguous()
    batch = TrainingBatch(labels, labels, positions, kind, old, torch.tensor([5, 900, 77]))
    return student, teacher, batch


def scores_of(teacher, batch) -> TeacherScores:
    """What a teacher of whole logits [s, b, V] says of the batch, by plain PyTorch."""
    log_t = teacher[..., :VOCAB].log_softmax(-1).transpose(0, 1)
    values, ids = log_t.topk(K, -1)
    entropy = -(log_t.exp() * log_t).sum(-1)
    return TeacherScores(log_t.gather(-1, batch.labels[..., None])[..., 0], ids, values, entropy)
