"""Converts single values of a row to text: ids, answers, finish reasons; problems are ValueErrors."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from megatron_tropd.data.messages import check_encodable

_CUT = {
    *("length", "max_tokens", "max_length", "max_new_tokens", "max_output_tokens", "model_length", "token_limit"),
    *("model_context_window_exceeded", "truncated", "incomplete", "abort", "content_filter", "error"),
}


def column_value(row: dict[str, Any], name: str) -> Any:
    """Return a column's value; `a.b` is the field b of the object in column a, where there is no column `a.b`."""
    if name in row or "." not in name:
        return row.get(name)
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    if isinstance(value, str) and value.lstrip().startswith("{"):  # an object in a file without nested types
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return column_value(value, inner) if isinstance(value, dict) else None


def id_text(value: Any) -> str:
    """Return an id as text, the same for 7, "7" and a column's 7.0; ValueError for what is no id."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = scalar_text(value, "id")
    if not text.strip():
        raise ValueError("id is empty")
    return text


def answer_text(value: Any) -> str:
    """Return an answer as text: that of a list of one, and in GSM8K's form what stands after ####."""
    if isinstance(value, str) and value.lstrip().startswith('["'):  # a list of one string as JSON text
        try:
            items = json.loads(value)
        except (ValueError, RecursionError):
            items = []
        value = items[0] if len(items) == 1 and isinstance(items[0], str) else value
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = scalar_text(value, "answer")
    return text.rsplit("####", 1)[1].strip() if "####" in text else text


def scalar_text(value: Any, name: str) -> str:
    """Return a string or number as text; ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a string or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a string or a number")
    check_encodable(value, name)
    return str(value)


def finish_reason(value: Any) -> str | None:
    """Return "length" for a response that was cut, however that is named, else what was given.

    SGLang gives an object with `type`, vLLM's stop_reason may be the id of the token that ended the response.
    """
    if isinstance(value, dict):
        value = value.get("type")
    if isinstance(value, int) and not isinstance(value, bool):
        return "stop"
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"finish_reason is a {type(value).__name__}, expected a string such as stop or length")
    return "length" if value.strip().lower().rpartition(".")[2] in _CUT else value
