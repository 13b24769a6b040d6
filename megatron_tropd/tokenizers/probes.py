"""Probe texts to compare two tokenizers by their ids, because the same pieces do not imply the same ids.

difference = first_difference(ours.encode, theirs.encode, PROBES)
check_same_ids(student, teacher, ("student", "teacher"))
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from megatron_tropd.errors import UserError

if TYPE_CHECKING:
    from megatron_tropd.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

# What tokenizers treat differently: spaces, line ends, digits, contractions, code, scripts, composed characters.
PROBES = (
    *("Hello world", " leading space", "trailing space ", "runs  of   spaces    here", "   ", "a\tb\n\nc\r\n d\n"),
    *("1234567890 3.14 -7 1,000 2024", "I'm sure THEY'LL say don't", "camelCase snake_case UPPER-case"),
    *("def f(x):\n    if x:\n\t\treturn x ** 2  # why?\n", 'path/to.file?x=1&y={"k": [0]}', "$\\frac{1}{2}$ x² ∑ → ≤"),
    *(
        "naïve café e\u0301 Å ﬁ ①",
        "中文字符,日本語かな 한국어",
        "Привет עברית हिन्दी ไทย",
        "🙂 👩‍👩‍👧 🇩🇪",
        "\u00a0x\u200by\u3000z",
    ),
)
_SHOWN_IDS = 8
_MOST_SPECIALS = 512

Encode = Callable[[str], list[int]]


def special_probes(pieces: Iterable[str]) -> list[str]:
    """Return one text per special piece, with the piece inside."""
    return [f"a {piece} b{piece}c" for piece in list(pieces)[:_MOST_SPECIALS]]


def first_difference(ours: Encode, theirs: Encode, probes: Iterable[str] = PROBES) -> tuple[str, list, list] | None:
    """Return the first text whose ids differ, with both; None if there is none."""
    for text in probes:
        first, second = list(ours(text)), list(theirs(text))
        if first != second:
            return text, first, second
    return None


def show_ids(ours: list, theirs: list) -> tuple[str, str]:
    """Return two lists of ids for a message, cut to where they begin to differ."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    start = max(0, same - 2)
    shown = []
    for ids in (ours, theirs):
        part = ["..."] * (start > 0) + ids[start : start + _SHOWN_IDS] + ["..."] * (len(ids) > start + _SHOWN_IDS)
        shown.append(f"[{', '.join(map(str, part))}]")
    return shown[0], shown[1]


def check_same_ids(ours: Tokenizer, theirs: Tokenizer, roles: tuple[str, str]) -> None:
    """Compare the ids of probe texts; a difference in special tokens or BOS alone, which prompts may avoid, is told.

    Raises:
        UserError: a plain text has other ids.
    """
    found = first_difference(ours.encode, theirs.encode)
    if found:
        first, second = show_ids(*found[1:])
        raise UserError(
            f"{roles[0]} and {roles[1]} have the same pieces but split texts otherwise: {found[0]!r} is "
            f"{first} to the {roles[0]} ({ours.name}) and {second} to the {roles[1]} "
            f"({theirs.name}), so the {roles[1]} would read texts as it has never seen them. Choose models of one "
            "family, or, if that is intended, set tokenizer.check_compatibility=false."
        )
    shaped = {i: piece for i, piece in ours.pieces().items() if piece[:1] in ("<", "[") and piece[-1] in (">", "]")}
    specials = [piece for i, piece in shaped.items() if ours.encode(piece) == [i]]
    if found := first_difference(ours.encode, theirs.encode, special_probes(specials)):
        logger.warning(
            "%s and %s parse a special token otherwise: %r is %s and %s; the %s's ids are used",
            *(*roles, found[0], *show_ids(*found[1:]), roles[0]),
        )
    elif (ours.bos_id is None) != (theirs.bos_id is None):
        logger.warning(
            "raw `text` prompts start %s BOS, as the %s's tokenizer does; the %s's does otherwise",
            *("without" if ours.bos_id is None else "with", *roles),
        )
