"""Part C of the method: prefixes of the teacher's responses, shortened over the run, from which the student continues.

Prefix length = floor(alpha(step) L_T). `sft` and `seqkd` use the same way: their prefix is the whole response.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from megatron_tropd.config import ColumnsConfig, GuidanceConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts.responses import Responses
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt

logger = logging.getLogger(__name__)

_KEPT_RESPONSES = 10_000  # tokenized ones that are held for the next epoch: all of a small file


def prefix_fraction(schedule: str, step: int, steps: int, start: float = 1.0) -> float:
    """Return alpha(step), the share of the teacher's response that is given: start at step 0, nothing at `steps`.

    cosine is the paper's (1 + cos(pi step / T)) / 2; linear 1 - step / T; constant stays at `start`; none is 0.

    Raises:
        ValueError: the schedule is unknown.
    """
    progress = min(step / steps, 1.0)
    shares = {
        "cosine": (1.0 + math.cos(math.pi * progress)) / 2.0,
        "linear": 1.0 - progress,
        "constant": 1.0,
        "none": 0.0,
    }
    if schedule not in shares:
        raise ValueError(f"guidance schedule {schedule!r} is none of {', '.join(shares)}")
    return start * shares[schedule]


class Guidance:
    """Hands out a step's prefixes."""

    def __init__(
        self,
        config: GuidanceConfig,
        steps: int,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        enabled: bool = True,
        whole_response: bool = False,
        endings: Endings | None = None,
        columns: ColumnsConfig | None = None,
    ):
        """Prepare the schedule and read `guidance.responses`, if the recipe names them.

        Args:
            config: `guidance.*`.
            steps: T, the schedule's length.
            tokenizer: encodes the responses.
            max_tokens: longest response, prefix included (`rollout.max_new_tokens`).
            enabled: False for objectives without guidance: every prefix is empty.
            whole_response: `sft` and `seqkd`: every prefix is the whole response with EOS, whatever the schedule.
            endings: which EOS follows a response; default: the tokenizer's.
            columns: `data.columns.*`, for the file of responses as far as it has them.
        """
        self.config, self.steps, self.tokenizer, self.max_tokens = config, steps, tokenizer, max_tokens
        self.whole_response = whole_response
        self.endings = endings or Endings.of(tokenizer)
        self.enabled = whole_response or (enabled and config.schedule != "none")
        self._responses: Responses | None = None
        if self.enabled and config.responses:
            self._responses = Responses(config.responses, "guidance.responses", columns)
        self._tokens: dict[str, list[int]] = {}  # of the latest prompts
        self._told_end = False

    def fraction(self, step: int) -> float:
        """Return alpha(step)."""
        if not self.enabled:
            return 0.0
        return (
            1.0 if self.whole_response else prefix_fraction(self.config.schedule, step, self.steps, self.config.start)
        )

    def check(self, ids_without_response: Sequence[str], total: int) -> None:
        """Raise UserError if prefixes are wanted and prompts have no teacher response, here or in their own rows.

        Args:
            ids_without_response: of the prompts whose rows carry none.
            total: number of all prompts.
        """
        if not self.enabled:
            return
        missing = [name for name in ids_without_response if self._responses is None or name not in self._responses]
        if missing:
            raise UserError(
                f"{len(missing)} of {total} prompts have no teacher_response, the first is id {missing[0]!r}; "
                "write them with `megatron-tropd generate --model teacher` and name the file in guidance.responses, or "
                "set guidance.schedule=none."
            )

    def prefixes(self, prompts: list[Prompt], step: int) -> list[list[int]]:
        """Return one list of token ids per prompt: the first floor(alpha(step) L_T) of the teacher's L_T tokens.

        The response ends in EOS, so that a whole one leaves nothing for the student to write; one that was cut at its
        own token limit has no EOS, and is never whole.
        """
        fraction = self.fraction(step)
        if fraction == 0.0:
            return [[] for _ in prompts]
        prefixes = []
        for prompt in prompts:
            response = self._encode(prompt)
            prefixes.append(response[: min(math.floor(fraction * len(response)), self.max_tokens)])
        return prefixes

    def _encode(self, prompt: Prompt) -> list[int]:
        if prompt.id not in self._tokens:
            response = self._responses.get(prompt.id) if self._responses is not None else None
            text, finish_reason = response or (prompt.teacher_response, prompt.teacher_finish_reason)
            assert text is not None  # `check` refused prompts without a response
            if len(self._tokens) >= _KEPT_RESPONSES:
                self._tokens.clear()
            tokens = self._until_end(self.tokenizer.encode_response_to(prompt, text), prompt)
            if finish_reason != "length" and (not tokens or tokens[-1] not in self.endings.eos):
                tokens = [*tokens, self.endings.eos_after(prompt, self.tokenizer)]
            self._tokens[prompt.id] = tokens
        return self._tokens[prompt.id]

    def _until_end(self, tokens: list[int], prompt: Prompt) -> list[int]:
        """Return the tokens up to the first end of text, which some data sets write into the text."""
        end = next((place for place, token in enumerate(tokens) if token in self.endings.eos), len(tokens))
        rest = tokens[end + 1 :]
        if not self._told_end and self.tokenizer.decode(rest).strip():
            self._told_end = True
            logger.warning(
                "the teacher's response to prompt %r goes on after an end of text (id %d): %d tokens are left out, as "
                "in all such responses",
                *(prompt.id, tokens[end], len(rest)),
            )
        return tokens[: end + 1]
