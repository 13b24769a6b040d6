"""The dataclasses that the stages exchange, and the legend of shapes; no behaviour, no imports of the package.

Shapes, in Megatron's dialect (all local to a rank unless said otherwise):

    b   micro-batch or batch rows        s   sequence length             h   hidden size
    v   true vocabulary size             V   vocabulary padded to a multiple of tp; V/tp is one rank's shard
    n   flattened tokens                 k   teacher's top-k             j   ids looked up per token (1 + k)
    tp, pp, cp, dp   parallel sizes

A *sequence* is  prompt | teacher prefix (guidance, may be empty) | student tokens.  Token tensors are [b, s];
position t of `labels`, `loss_kind`, `old_logprobs` and every score refers to the token that position t predicts, i.e.
of tokens[t + 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from megatron_tropd.errors import UserError  # noqa: F401  (part of this module's interface)

# Values of TrainingBatch.loss_kind.
LOSS_NONE = 0  # prompt and padding
LOSS_STUDENT = 1  # token written by the student: trust-region objective
LOSS_GUIDANCE = 2  # token of a teacher-written prefix (or of the data, for `sft` and `seqkd`)


@dataclass
class Prompt:
    """One row of a prompt file. Exactly one of `messages` (chat) and `text` (raw) is set."""

    id: str
    messages: list[dict[str, Any]] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None  # for the chat template
    chat_template_kwargs: dict[str, Any] | None = None  # of this row; they go before tokenizer.chat_template_kwargs
    teacher_response: str | None = None  # for guidance prefixes, `sft` and `seqkd`
    teacher_finish_reason: str | None = None  # "length": the response was cut, so no EOS follows it
    answer: str | None = None  # for verifiable evaluation
    domain: str | None = None  # by which results are reported apart
    row: str = ""  # where it was read, "prompts.jsonl:12", for messages
    index: int = 0  # position in the global prompt order: prompt epoch * len(file) + place; sample ids derive from it
    tokens: list[int] = field(default_factory=list)  # the templated, tokenized prompt


@dataclass
class Sampling:
    """How responses are drawn. Randomness is a pure function of (seed, step, sample id, position)."""

    samples_per_prompt: int = 1
    max_new_tokens: int = 128  # student tokens beyond the prefix
    temperature: float = 1.0  # 0 means greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    stop: tuple[str, ...] = ()  # stop strings
    seed: int = 0
    step: int = 0


@dataclass
class Rollouts:
    """Responses of one data-parallel rank, one entry per sample; the same on all its model-parallel ranks.

    For sample i: tokens[i][: prompt_lengths[i]] is the prompt, the next prefix_lengths[i] the teacher's prefix, the
    rest (lengths[i] in all) the student's own; logprobs[i] are π_old of the student's own tokens, in order, at the
    sampling temperature and before top-k/top-p filtering.
    """

    tokens: list[list[int]]
    prompt_lengths: list[int]
    prefix_lengths: list[int]
    lengths: list[int]
    logprobs: list[list[float]]
    # "eos" (an end-of-text id, or a special token named as stop string) | "stop" (another stop string) | "length" |
    # "prefix" (the prefix was a whole response)
    finish_reasons: list[str]
    sample_ids: list[int]  # global and layout-independent: prompt.index * samples_per_prompt + sample number
    prompts: list[Prompt] = field(default_factory=list)  # the prompt of each sample
    texts: list[str] = field(default_factory=list)  # decoded student tokens, special tokens and stop string left out

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class TrainingBatch:
    """Padded sequences of one data-parallel rank, or one micro-batch of them, which may be packed into one row."""

    tokens: torch.Tensor  # [b, s] int64
    labels: torch.Tensor  # [b, s] int64, tokens shifted left by one; 0 where there is no next token
    position_ids: torch.Tensor  # [b, s] int64
    loss_kind: torch.Tensor  # [b, s] int8, LOSS_*
    old_logprobs: torch.Tensor  # [b, s] fp32, π_old of labels where loss_kind is LOSS_STUDENT, else 0
    sample_ids: torch.Tensor  # [b] int64; -1 marks a filler row without loss; packed, [1, t] of every token
    weights: torch.Tensor | None = None  # [b, s] fp32, factors of the losses (rollout/filters.py); None: 1 everywhere
    packed_seq_params: Any | None = None  # Megatron's, of a packed micro-batch (parallel/micro_batches.py)

    def rows(self, start: int, stop: int) -> TrainingBatch:
        """Return rows [start, stop) as views."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: t[start:stop] for name, t in tensors.items() if isinstance(t, torch.Tensor)})

    @property
    def token_sample_ids(self) -> torch.Tensor:
        """The sample [b, s] of every token."""
        ids = self.sample_ids
        return ids if ids.dim() > 1 else ids.unsqueeze(-1).expand_as(self.tokens)

    @property
    def num_loss_tokens(self) -> torch.Tensor:
        """Number of tokens with a loss, int64 scalar tensor."""
        return (self.loss_kind != LOSS_NONE).sum()


@dataclass
class TeacherScores:
    """What the student's loss needs of the teacher, aligned with TrainingBatch.labels.

    Lives on the last pipeline stage only; other stages hold None.
    """

    logprobs: torch.Tensor  # [b, s] fp32, log π_T(labels)
    topk_ids: torch.Tensor  # [b, s, k] global ids, most probable first; int32 for a whole batch, to save memory
    topk_logprobs: torch.Tensor  # [b, s, k] fp32, normalised over the whole true vocabulary
    entropy: torch.Tensor | None = None  # [b, s] fp32, nats
    hidden: torch.Tensor | None = None  # [b, s, h_teacher], only for full-vocabulary objectives
    advantages: torch.Tensor | None = None  # [b, s] fp32, only for objectives over whole responses (Objective.prepare)
    weights: torch.Tensor | None = None  # [b, s] fp32, only for objectives on selected tokens (Objective.prepare)
