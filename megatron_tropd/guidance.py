"""Part C of the method: prefixes of the teacher's responses, shortened over the run, from which the student continues.

Prefix length = floor(alpha(step) L_T). `sft` and `seqkd` use the same way: their prefix is the whole response.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from megatron_tropd.config import GuidanceConfig
from megatron_tropd.endings import Endings
from megatron_tropd.errors import UserError
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.types import Prompt


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


def load_responses(path: str | Path) -> dict[str, str]:
    """Read a JSONL of {"id", "teacher_response"}; UserError names file and line of anything else."""
    responses = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines would also split inside of texts
    except OSError as error:
        raise UserError(f"guidance.responses={path} cannot be read ({error.strerror}); give a JSONL file.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            responses[str(record["id"])] = str(record["teacher_response"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{path}:{number} is no object with "id" and "teacher_response" ({error!r}); mend or remove the line.'
            ) from error
    return responses


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
        """
        self.config, self.steps, self.tokenizer, self.max_tokens = config, steps, tokenizer, max_tokens
        self.whole_response = whole_response
        self.endings = endings or Endings.of(tokenizer)
        self.enabled = whole_response or (enabled and config.schedule != "none")
        self._responses = load_responses(config.responses) if self.enabled and config.responses else {}
        self._tokens: dict[str, list[int]] = {}

    def fraction(self, step: int) -> float:
        """Return alpha(step)."""
        if not self.enabled:
            return 0.0
        return (
            1.0 if self.whole_response else prefix_fraction(self.config.schedule, step, self.steps, self.config.start)
        )

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError if some prompt has no teacher response though prefixes are wanted."""
        if not self.enabled:
            return
        missing = [p.id for p in prompts if self._response(p) is None]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(prompts)} prompts have no teacher_response, the first is id {missing[0]!r}; "
                "write responses with tools/generate_teacher_responses.py and name the file in guidance.responses, "
                "or set guidance.schedule=none."
            )

    def prefixes(self, prompts: list[Prompt], step: int) -> list[list[int]]:
        """Return one list of token ids a prompt: the first floor(alpha(step) L_T) of the teacher's L_T tokens.

        The response ends in EOS, so that a whole one leaves nothing for the student to write.
        """
        fraction = self.fraction(step)
        if fraction == 0.0:
            return [[] for _ in prompts]
        prefixes = []
        for prompt in prompts:
            response = self._encode(prompt)
            prefixes.append(response[: min(math.floor(fraction * len(response)), self.max_tokens)])
        return prefixes

    def _response(self, prompt: Prompt) -> str | None:
        return self._responses.get(prompt.id, prompt.teacher_response)

    def _encode(self, prompt: Prompt) -> list[int]:
        if prompt.id not in self._tokens:
            tokens = self.tokenizer.encode_response(self._response(prompt))
            if not tokens or tokens[-1] not in self.endings.eos:  # some data sets write it into the text
                tokens = [*tokens, self.endings.eos_after(prompt, self.tokenizer)]
            self._tokens[prompt.id] = tokens
        return self._tokens[prompt.id]
