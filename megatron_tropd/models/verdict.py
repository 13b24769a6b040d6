"""The verdict of a comparison with transformers: rounding, which passes, or a missing part, with its likely cause.

judge(Verdict(parts, layers, num_layers), bound)     # None, or what differs
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tropd.models.reference import Part

_OWN = 24  # times transformers' own rounding is rounding, too
_OWN_MOST = 100  # but never more than this many times the bound
_NEAR = 60  # times transformers' own rounding may still be rounding
_FLIPS = 0.01  # of the positions, in MoE layers, where rounding may route to other experts


@dataclass(frozen=True)
class Verdict:
    """What was compared, and how far apart it is."""

    parts: list[Part]
    layers: tuple[int, ...]
    num_layers: int

    @property
    def difference(self) -> float:
        """Largest relative difference of any part at any position."""
        return max(part.difference.max().item() for part in self.parts)

    @property
    def own(self) -> float:
        """Transformers' own: the largest one between sdpa and eager attention."""
        return max(part.own.max().item() for part in self.parts)

    def __str__(self) -> str:
        import transformers

        length = len(self.parts[0].difference)
        return (
            f"verified {len(self.layers)} of {self.num_layers} layers + embedding and output on {length} tokens "
            f"against transformers {transformers.__version__} (fp32): largest relative difference "
            f"{self.difference:.2g}, transformers' own (sdpa to eager) {self.own:.2g}"
        )


def judge(verdict: Verdict, bound: float) -> str | None:
    """Return what differs by more than rounding and what it looks like; None where nothing does."""
    for part in verdict.parts:
        own = part.own.max().item()
        rounding = min(_OWN * own, _OWN_MOST * bound)
        allowed = max(bound, rounding)
        beyond = ~(part.excess <= allowed)  # NaN is beyond
        if not beyond.sum() > (_FLIPS * len(beyond) if part.sparse else 0):
            continue
        first, count = int(beyond.nonzero()[0]), int(beyond.sum())
        largest = part.excess.max().item() if not part.excess.isnan().any() else math.nan
        text = (
            f"{part.name} differs from transformers' by {largest:.3g} of what it adds, more than the bound of "
            f"{bound:g} (transformers' own rounding there, sdpa to eager: {own:.2g}), at {count} of {len(beyond)} "
            f"positions, the first {first}. "
        )
        if largest <= _NEAR * max(rounding / _OWN, 2.0**-20):
            return text + "So little may be rounding of unusually large numbers: if it is, raise the bound (--bound)."
        return text + f"That is no rounding: {_suspect(part, first, count / len(beyond))}."
    return None


def _suspect(part: Part, first: int, share: float) -> str:
    if part.excess.isnan().any():
        return "there are NaNs, in the weights or in what was computed of them"
    if part.name == "the embedding":
        return "other rows, or a factor on the embedding that this conversion does not know"
    if part.layer is None:
        return "another final norm or output layer, or a factor or cap on the logits that this conversion does not know"
    if first == 0:
        return (
            "it is there at position 0, where attention has a single key: another norm or its epsilon, a bias, an "
            "activation, experts, or weights in another order"
        )
    if first < 4 and share > 0.5:
        return "it begins with the second token: the rotary embedding (theta, scaling), softmax's scale or q/k norms"
    return f"it begins at position {first}: an attention window, chunks, or a rotary scaling that begins there"
