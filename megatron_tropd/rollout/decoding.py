"""Sampling settings and stop strings, shared by rollouts, `generate` and evaluation.

A stop string that is a special token of the tokenizer ends a response as an EOS id does. Any other is searched in the
decoded text, even if it is a single token, because other tokens contain it as well (".\\n" holds a line break).
That text contains only the special tokens that occur in a stop string.

    sampling = make_sampling(recipe.rollout, recipe.training.seed, step=7)
    stops = Stops.of(tokenizer, sampling.stop)
    stops.cut(tokenizer.decode, tokens)
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.config import RolloutConfig
from megatron_tropd.types import Sampling

logger = logging.getLogger(__name__)

Decode = Callable[[list[int]], str]

_LOOKS_SPECIAL = re.compile(r"<[|｜].+[|｜]>|</?s>|<(?:eos|bos|pad|end_of_turn|start_of_turn|endoftext)>|\[/?INST\]")

_SPACE = " ▁"  # a piece of spaces alone decodes to nothing as well, at the start of a text


def make_sampling(rollout: RolloutConfig, seed: int, step: int = 0, **own: Any) -> Sampling:
    """Return how responses are drawn: as `rollout` says, but for the fields of Sampling in `own` that are not None."""
    names = ("samples_per_prompt", "max_new_tokens", "temperature", "top_k", "top_p", "stop")
    values = {name: getattr(rollout, name) for name in names}
    values |= {name: value for name, value in own.items() if value is not None}
    return Sampling(**{**values, "stop": tuple(values["stop"])}, seed=seed, step=step)


@dataclass(frozen=True)
class Stops:
    """Stop strings as one tokenizer understands them."""

    ids: frozenset[int] = frozenset()  # of those that are a special token
    texts: tuple[str, ...] = ()  # the others
    inside: dict[int, str] = field(default_factory=dict)  # special tokens that occur in `texts`

    @classmethod
    def of(cls, tokenizer: Any, stop: tuple[str, ...] | list[str]) -> Stops:
        """Tell the special tokens among the stop strings `stop` from texts."""
        if not stop:
            return cls()
        inside = special_tokens(tokenizer, lambda piece: any(piece in text for text in stop))
        specials = {piece: i for i, piece in inside.items()}
        texts = tuple(text for text in stop if text not in specials)
        inside = {i: piece for i, piece in inside.items() if any(piece in text for text in texts)}
        return cls(frozenset(specials[text] for text in stop if text in specials), texts, inside)

    def decode(self, decode: Decode, tokens: list[int]) -> str:
        """Return the text of `tokens` with the special tokens that occur in a stop string."""
        return "".join(text for text, _ in self._parts(decode, tokens))

    def found(self, decode: Decode, tokens: list[int]) -> bool:
        """Whether the text of `tokens` holds a stop string."""
        text = self.decode(decode, tokens)
        return any(stop in text for stop in self.texts)

    def cut(self, decode: Decode, tokens: list[int]) -> str:
        """Return the text of `tokens` before the first stop string, without special tokens."""
        parts = self._parts(decode, tokens)
        text = "".join(part for part, _ in parts)
        left, kept = min((text.find(stop) for stop in self.texts if stop in text), default=len(text)), ""
        for part, is_special in parts:
            kept += "" if is_special else part[:left]
            left = max(0, left - len(part))
        return kept

    def _parts(self, decode: Decode, tokens: list[int]) -> list[tuple[str, bool]]:
        """Return the text in parts, each with whether it is a special token of a stop string."""
        parts, start = [], 0
        for place, token in enumerate(tokens if self.inside else ()):
            if token in self.inside:
                parts += [(decode(tokens[start:place]), False), (self.inside[token], True)]
                start = place + 1
        return [*parts, (decode(tokens[start:]), False)]


def special_tokens(tokenizer: Any, accepts: Callable[[str], bool]) -> dict[int, str]:
    """Return the special tokens whose pieces `accepts` lets pass: those that decoding leaves out."""
    found = {i: piece for i, piece in tokenizer.pieces().items() if accepts(piece)}
    return {i: piece for i, piece in found.items() if is_special(tokenizer, i)}


def is_special(tokenizer: Any, token: int) -> bool:
    """Whether decoding leaves out a token of the vocabulary."""
    return bool(tokenizer.pieces()[token].strip(_SPACE)) and not tokenizer.decode([token])


def explain_stops(tokenizer: Any, stop: list[str] | None, key: str) -> None:
    """Warn of stop strings that may not do what they seem to; `key` names them."""
    stops = Stops.of(tokenizer, stop or ())
    for text in stops.texts:
        written = stops.decode(tokenizer.decode, tokenizer.encode("a" + text))
        if _LOOKS_SPECIAL.fullmatch(text):
            logger.warning(
                "%s: %r looks like a special token, but the tokenizer has none of this name: it is looked for as text, "
                "letter by letter",
                *(key, text),
            )
        elif text not in written:
            logger.warning(
                "%s: the tokenizer writes %r as %r: this stop string may never be found", key, text, written[1:]
            )
