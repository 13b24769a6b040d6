"""Draws tokens from logits and follows each response until it ends; independent of the inference engine.

A token is the inverse of the cumulative distribution at a uniform that depends on (seed, step, sample id, position)
alone, so the responses do not depend on the batch, on its order or on the parallel layout. The probabilities are taken
in the order of token ids: nothing is sorted unless top-k or top-p ask for it. One rank of a model replica draws and
tells the others, so that rounding can never set them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megatron_tropd.counter_rng import STREAM_SAMPLING, counter_uniform
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.rollout.decoding import Stops
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt, Sampling

ELEMENTS_AT_ONCE = 1 << 25  # bounds the [rows, v] temporaries of one draw: 128 MiB in fp32, 256 MiB in fp64


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    end: EndOfText | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row.

    Args:
        logits: [n, v] of any floating dtype, v the true vocabulary.
        uniforms: [n] float64 in [0, 1).
        temperature: 0 takes the most probable token (the lowest id of equals).
        top_k: keep the k most probable tokens; 0: all.
        top_p: then keep the fewest most probable tokens whose mass reaches top_p; 1: all.
        end: end-of-text ids that are one event.

    Returns:
        Tokens [n] int64 and their log-probs [n] fp32, of the whole softmax at `temperature` (1 when it is 0), before
        top-k and top-p; of the whole event where the token is one of `end`.
    """
    rows = max(1, ELEMENTS_AT_ONCE // logits.size(1))
    parts = [
        _draw_rows(part, u, temperature, top_k, top_p, end or EndOfText())
        for part, u in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    tokens, logprobs = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw_rows(
    logits: torch.Tensor, uniforms: torch.Tensor, temperature: float, top_k: int, top_p: float, end: EndOfText
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    if temperature == 0:
        tokens = scaled.argmax(-1)
    else:
        probabilities = torch.softmax(scaled, -1)
        if top_k > 0 or top_p < 1:
            probabilities = keep_top(probabilities, top_k, top_p)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        # Strictly below the total, so that a token without probability at the end is never reached by rounding.
        place = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, place, right=True)[:, 0].clamp_(max=logits.size(1) - 1)
    chosen = end.merge(scaled.gather(-1, end.extend(tokens[:, None])), tokens[:, None])[:, 0]
    return tokens, chosen - scaled.logsumexp(-1)


def keep_top(probabilities: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Return `probabilities` [n, v] with zeros outside the top-k and, of these renormalised, outside the nucleus top_p.

    The result is not renormalised. At least one token per row stays.
    """
    k = min(top_k, probabilities.size(-1)) if top_k > 0 else probabilities.size(-1)
    top, ids = probabilities.topk(k, -1)
    if top_p < 1:
        before = top.cumsum(-1) - top
        top = torch.where(before < top_p * top.sum(-1, keepdim=True), top, 0.0)
    return torch.zeros_like(probabilities).scatter_(-1, ids, top)


@dataclass
class Response:
    """One sample under way: what it starts from, what it may grow to, and what was drawn so far."""

    prompt: Prompt
    sample_id: int
    prefix: list[int]
    budget: int  # student tokens it may still get at the start
    tokens: list[int] = field(default_factory=list)  # the student's
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def start(self) -> list[int]:
        """Token ids from which the student continues."""
        return self.prompt.tokens + self.prefix


class Sampler:
    """Draws the next token of any subset of responses and reports which of them end with it."""

    def __init__(
        self,
        responses: list[Response],
        tokenizer: Tokenizer,
        sampling: Sampling,
        groups: ParallelGroups,
        vocab_size: int,
        endings: Endings | None = None,
        end: EndOfText | None = None,
        on_token: Callable[[Response], object] | None = None,
    ):
        """Draw for `responses`; `on_token` is called with a response after each of its tokens is recorded."""
        self.responses = list(responses)
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._device = groups.device
        self._vocab_size = vocab_size
        self._stops = Stops.of(tokenizer, sampling.stop)
        self._end_ids = (endings or Endings.of(tokenizer)).eos | self._stops.ids
        self._end = end or EndOfText()
        self._on_token = on_token
        self._sample_ids = torch.tensor([r.sample_id for r in responses], dtype=torch.int64, device=groups.device)
        self._group = groups.mp if groups.mp.size() > 1 else None
        # The group's ranks run over the tensor-parallel ranks first: this is the last stage's first one.
        self._source = dist.get_process_group_ranks(groups.mp)[(groups.pp_size - 1) * groups.tp_size]
        self._context = groups.cp if groups.cp.size() > 1 else None
        self._draws = groups.rank == self._source
        assert not self._draws or (groups.is_last_stage and groups.tp_rank == 0), "unexpected order of ranks"
        # Any token holds at least one byte of text, so this many of them surely cover a stop string just completed.
        self._stop_window = max((len(s.encode()) for s in self._stops.texts), default=0) + 4
        self._stop_ends = {s[-1] for s in self._stops.texts}
        self._may_stop: dict[int, bool] = {}  # by token id

    def add_filler(self) -> int:
        """Add a response of one token that nobody asked for; return its place among the responses."""
        prompt = Prompt(id="", tokens=[self._tokenizer.pad_id])
        self.responses.append(Response(prompt, sample_id=0, prefix=[], budget=1))
        self._sample_ids = torch.cat([self._sample_ids, self._sample_ids.new_zeros(1)])
        return len(self.responses) - 1

    def advance(
        self, logits: torch.Tensor | None, rows: list[int], positions: torch.Tensor
    ) -> tuple[torch.Tensor, list[bool]]:
        """Draw, record and judge the next token of responses `rows`.

        Args:
            logits: [n, V], needed only on the last stage's first tensor-parallel rank.
            rows: n places in `responses`.
            positions: [n] integer, the places in the sequence that the new tokens take.

        Returns:
            Tokens [n] int64 on the groups' device, and n times whether the response ends.
        """
        drawn = torch.empty(2, len(rows), dtype=torch.float64, device=self._device)
        if self._draws:
            assert logits is not None  # the rank that draws has them
            sampling = self._sampling
            sample_ids = self._sample_ids[torch.tensor(rows, device=self._device)]
            uniforms = counter_uniform(
                sampling.seed, STREAM_SAMPLING, sampling.step, sample_ids, positions.to(self._device)
            )
            drawn[0], drawn[1] = draw(
                logits[:, : self._vocab_size], uniforms, sampling.temperature, sampling.top_k, sampling.top_p, self._end
            )
        if self._group is not None:
            dist.broadcast(drawn, self._source, group=self._group)
        if self._context is not None:
            # These ranks generate the same; rounding on a GPU must not let them part.
            dist.broadcast(drawn, dist.get_global_rank(self._context, 0), group=self._context)
        tokens, logprobs = drawn.tolist()
        ended = [self._record(*item) for item in zip(rows, tokens, logprobs, strict=True)]
        return drawn[0].long(), ended

    def _record(self, row: int, token: float, logprob: float) -> bool:
        response = self.responses[row]
        response.tokens.append(int(token))
        response.logprobs.append(logprob)
        if int(token) in self._end_ids:
            response.finish_reason = "eos"
        elif self._can_end_stop_string(int(token)) and self._has_stop_string(response.tokens):
            response.finish_reason = "stop"
        elif len(response.tokens) >= response.budget:
            response.finish_reason = "length"
        if self._on_token is not None:
            self._on_token(response)
        return response.finish_reason is not None

    def _can_end_stop_string(self, token: int) -> bool:
        """Whether the token's text may hold the last character of a stop string; decoded once per id.

        A tokenizer drops blanks around a single token and shows bytes of an unfinished character as U+FFFD: both count
        as anything.
        """
        if not self._stop_ends:
            return False
        if token not in self._may_stop:
            text = self._stops.decode(self._tokenizer.decode, [token])
            blank = any(end.isspace() for end in self._stop_ends)
            self._may_stop[token] = blank or "\ufffd" in text or not self._stop_ends.isdisjoint(text)
        return self._may_stop[token]

    def _has_stop_string(self, tokens: list[int]) -> bool:
        return self._stops.found(self._tokenizer.decode, tokens[-self._stop_window :])
