"""Multiple-choice rows: appends the options to the question, and turns the answer into the letter of an option.

    choices = read_choices({"choices": ["3", "4"]})        # {"A": "3", "B": "4"}
    with_choices("2 + 2?", choices), letter(1, choices)    # "2 + 2?\\n\\nA. 3\\nB. 4", "B"

It reads MMLU's list, ARC's {"text", "label"}, MedQA's {"A": ..., "B": ...}, lists of objects and lettered options.
"""

from __future__ import annotations

import re
import string
from typing import Any

from megatron_tropd.data.messages import check_encodable, parse_nested

CHOICES = ("choices", "options")
ANSWERS = ("answerKey", "answer_idx", "answer_index")  # beside `answer`
_LETTERED = re.compile(r"\(?([A-Z])[).:]\s*")


def read_choices(row: dict[str, Any]) -> dict[str, str] | None:
    """Return the options of a row by label; None where it has none. ValueError for a form that is not known."""
    name = next((name for name in CHOICES if row.get(name)), None)
    if name is None:
        return None
    value = parse_nested(row[name], name)
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = dict(zip(value.get("label") or string.ascii_uppercase, value["text"], strict=False))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = {item.get("label", item.get("key")): item.get("text", item.get("value")) for item in value}
    elif isinstance(value, list) and 2 <= len(value) <= len(string.ascii_uppercase):
        value = dict(zip(string.ascii_uppercase, value, strict=False))
    if not isinstance(value, dict) or not all(isinstance(label, str) for label in value):
        raise ValueError(f"{name} is no list of options with a label each; write them into the prompt")
    if not all(isinstance(text, str | int | float) for text in value.values()):
        raise ValueError(f"{name} holds an option that is no text; write them into the prompt")
    choices = {label: str(text) for label, text in value.items()}
    check_encodable(choices, name)
    lettered = {label: _LETTERED.match(text) for label, text in choices.items()}
    bare = {label: choices[label][match.end() :] for label, match in lettered.items() if match and match[1] == label}
    return bare if len(bare) == len(choices) else choices


def with_choices(question: str, choices: dict[str, str]) -> str:
    """Return the question with the options under it, or as it is if it holds all of them."""
    if all(text.strip() in question for text in choices.values()):
        return question
    return "\n".join([f"{question}\n", *(f"{label}. {text}" for label, text in choices.items())])


def letter(answer: Any, choices: dict[str, str]) -> str:
    """Return the label of the answer, which is a label, the text of an option, or its place counted from 0."""
    text = str(answer).strip()
    if text in choices:
        return text
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    same = [label for label, option in choices.items() if option.strip() == text]
    if len(same) == 1 and isinstance(answer, str):
        return same[0]
    place = int(text) if isinstance(answer, str) and re.fullmatch(r"\d{1,2}", text) else answer
    if isinstance(place, int) and not isinstance(place, bool) and 0 <= place < len(choices):
        return list(choices)[place]
    raise ValueError(f"answer {text[:40]!r} is none of the options {', '.join(choices)}, nor the text or place of one")
