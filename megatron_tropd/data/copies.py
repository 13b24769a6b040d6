"""Columns that repeat each other: many data sets store a conversation and also its question or its rendered text.

repeated({"messages": [{"role": "user", "content": "2 + 2?"}], "prompt": "2 + 2?"})     # {"prompt"}
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_tropd.data.messages import parse_nested


def repeated(columns: dict[str, Any], also_in_text: Sequence[Any] = ()) -> set[str]:
    """Return the names of the columns that say nothing that another does not say.

    A question that a conversation's user asks, the beginning of a longer conversation, `text` that holds all of another
    column and of `also_in_text`, and blank columns.
    """
    texts = {name: _texts(value) for name, value in columns.items()}
    left_out = {name for name, found in texts.items() if not "".join(found).strip()}
    for name, found in texts.items():
        others = {other: texts[other] for other in texts if other not in (name, *left_out)}
        if name in left_out or not others:
            continue
        if name == "text" and isinstance(columns[name], str):
            needed = [text for value in also_in_text for text in _texts(value)]
            if any(all(part.strip() in found[0] for part in (*other, *needed)) for other in others.values()):
                left_out.add(name)
        elif any(_repeats(columns[name], found, columns[other], longer) for other, longer in others.items()):
            left_out.add(name)
    return left_out


def _repeats(value: Any, texts: list[str], other: Any, longer: list[str]) -> bool:
    """Return whether a conversation begins with these texts, or its user asks this question."""
    if isinstance(other, str):
        return False
    if not isinstance(value, str):
        return longer[: len(texts)] == texts
    question = texts[0].strip()
    return any(text.strip().startswith(question) or text.strip().endswith(question) for text in longer)


def _texts(value: Any) -> list[str]:
    """Return the texts of a string, or of a conversation's turns."""
    if isinstance(value, str):
        if not value.lstrip().startswith("[{"):
            return [value]
        try:
            value = parse_nested(value, "")
        except ValueError:
            return [value]
    if not isinstance(value, list):
        return [repr(value)] if value else []
    turns = [turn.get("content", turn.get("value")) if isinstance(turn, dict) else turn for turn in value]
    return [turn if isinstance(turn, str) else repr(turn) for turn in turns]
