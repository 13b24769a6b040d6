"""Packs a token's scores into one int32 row for communication; fp32 numbers and hidden states are stored as bits.

One tensor is one exchange. Both ends know the format; rows of tokens without a loss are never sent.

    format = ScoreFormat(topk=64)
    scores = format.unpack(format.pack(scores))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tropd.rounding import ceil_div
from megatron_tropd.types import TeacherScores


@dataclass(frozen=True)
class ScoreFormat:
    """What is sent of each token: the sampled log-prob, and what is said here."""

    topk: int  # of the most probable tokens, ids and log-probs
    with_entropy: bool = True
    hidden_size: int = 0  # of the teacher's hidden states; 0: none are sent
    hidden_dtype: torch.dtype = torch.float32

    @property
    def _hidden_words(self) -> int:
        return ceil_div(self.hidden_size * self.hidden_dtype.itemsize, 4)

    @property
    def channels(self) -> int:
        """Numbers a token."""
        return 1 + self.with_entropy + 2 * self.topk + self._hidden_words

    def pack(self, scores: TeacherScores) -> torch.Tensor:
        """Put scores [b, s, ...] into one int32 tensor [b, s, channels]."""
        numbers = [scores.logprobs.unsqueeze(-1), scores.topk_logprobs]
        if self.with_entropy:
            assert scores.entropy is not None  # what the format says
            numbers.append(scores.entropy.unsqueeze(-1))
        columns = [scores.topk_ids.int(), torch.cat(numbers, dim=-1).view(torch.int32)]
        if self.hidden_size:
            assert scores.hidden is not None  # what the format says
            hidden = scores.hidden.to(self.hidden_dtype)
            odd = self._hidden_words * 4 // self.hidden_dtype.itemsize - self.hidden_size
            columns.append(torch.nn.functional.pad(hidden, (0, odd)).contiguous().view(torch.int32))
        return torch.cat(columns, dim=-1)

    def unpack(self, packed: torch.Tensor) -> TeacherScores:
        """Undo `pack`; all are views, so that a whole batch's scores lie in memory once."""
        ids, numbers, hidden = packed.split([self.topk, 1 + self.topk + self.with_entropy, self._hidden_words], dim=-1)
        numbers = numbers.view(torch.float32)
        return TeacherScores(
            logprobs=numbers[..., 0],
            topk_ids=ids,
            topk_logprobs=numbers[..., 1 : 1 + self.topk],
            entropy=numbers[..., -1] if self.with_entropy else None,
            hidden=hidden.view(self.hidden_dtype)[..., : self.hidden_size] if self.hidden_size else None,
        )
