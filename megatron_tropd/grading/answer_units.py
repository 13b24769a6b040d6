r"""Units, currencies, percent signs and scales ("3 million") before or after a quantity.

A unit is separated only if it cannot be part of the quantity: inside a text command, or as a word that is no name,
number or function. "5x" and "2 thirds" have none.

    split_unit(r"12\text{ cm}^2")  # ("12", "cm^2", 1)
"""

from __future__ import annotations

import re

from megatron_tropd.grading.answer_text import CURRENCY

_SCALES = {"hundred": 100, "dozen": 12, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT = {  # units of one or two letters that are taken for units without a text command
    *("cm", "mm", "km", "dm", "nm", "ft", "in", "yd", "mi", "kg", "mg", "lb", "oz", "ml", "mL", "cl", "cL", "dl", "hr"),
    *("ms", "Hz", "kW", "kJ", "Pa", "eV", "pt", "qt", "kN", "mA", "GB", "MB", "kB", "sq", "cu", "h", "s"),
    *("am", "pm", "AM", "PM"),
}
_NOT_UNITS = {  # words after a number that change it, or say that there is more
    *("or", "and", "if", "for", "when", "where", "not", "to", "from", "over", "base", "mod", "remainder", "half"),
    *("halves", "third", "thirds", "quarter", "quarters", "fourths", "fifths", "sixths", "sevenths", "eighths"),
    *("ninths", "tenths", "hundredths", "thousandths", "squared", "cubed", "factorial", "plus", "minus", "negative"),
    *("times", "with", "but", "than", "is", "are", "was", "except", "because", "since", "as", "so", "each", "k", "m_"),
    *("by", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "pi", "sqrt", "inf", "infinity", "undefined"),
    *("mil", "x", "y", "z", "n", "i", "e", "million", "billion", "thousand", "dozen", "hundred", "trillion", "or so"),
    *("almost", "about", "more", "less", "fewer", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "one", "only", "no", "choose", "mod", "modulo", "up", "down", "below", "above", "radicals", "multiples"),
}
_ALIASES = {
    **dict.fromkeys(("percent", "percentage", "pct", "per cent", "\\%"), "%"),
    **{"¢": "cent"},
    **dict.fromkeys((CURRENCY, "dollar", "usd", "us dollar", "buck"), "dollar"),
    **{"£": "pound sterling", "€": "euro", "eur": "euro", "₹": "rupee", "rs": "rupee", "inr": "rupee", "¥": "yen"},
    **dict.fromkeys(("°", "deg", "degree"), "degree"),
    **{"centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "meter": "m", "metre": "m"},
    **{"kilometer": "km", "kilometre": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd"},
    **{"mile": "mi", "gram": "g", "kilogram": "kg", "pound": "lb", "ounce": "oz", "liter": "l", "litre": "l"},
    **{"hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s", "day": "d", "radian": "rad"},
    **{"mph": "mi/h", "kmh": "km/h", "kph": "km/h"},
}
_BEFORE = re.compile(
    rf"([-+]?\s*)(?:([{CURRENCY}£€¥₹])|(?:\\text\s*\{{\s*)?(Rs|USD|EUR|INR)\b\.?\s*\}}?)\s*", re.IGNORECASE
)
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
_AFTER_TEXT = re.compile(rf"(?:\s*[/·]?\s*\\text\s*\{{(?:[^{{}}]|\{{-?\d\}})*\}}{_POWER})+$")
_AFTER_WORDS = re.compile(
    rf"(?<=[\d\s}})!π])\s*([A-Za-z][A-Za-z.]*{_POWER}(?:(?:\s*/\s*|\s+)[A-Za-z][A-Za-z.]*{_POWER})*)$"
)
_AFTER_SIGN = re.compile(rf"\s*(%|°\s*[CFK]?|[{CURRENCY}£€¥₹¢])$")


def split_unit(text: str) -> tuple[str, str, int]:
    """Return the quantity without its unit, the unit in one spelling ("" if there is none), and the scale."""
    unit, scale = "", 1
    for _ in range(3):
        found = _one_behind(text)
        if found is None:
            break
        text, more, factor = found
        unit, scale = _joined(more, unit), scale * factor
    before = _BEFORE.match(text)
    if before and before.end() < len(text):
        unit = _joined(_spelled(before[2] or before[3]), unit)
        text = before[1] + text[before.end() :]
    return text.strip(), unit, scale


def _joined(first: str, second: str) -> str:
    return first if first == second else f"{first} {second}".strip()


def _one_behind(text: str) -> tuple[str, str, int] | None:
    sign = _AFTER_SIGN.search(text)
    if sign and sign.start() > 0:
        return text[: sign.start()], _spelled(sign[1].replace(" ", "")), 1
    tail = text[-200:]
    for pattern, in_text in ((_AFTER_TEXT, True), (_AFTER_WORDS, False)):
        match = pattern.search(tail)
        if not match:
            continue
        core = text[: len(text) - len(tail) + match.start()]
        words = re.sub(r"\\text\s*\{((?:[^{}]|\{-?\d\})*)\}", r"\1", match[0]).strip()
        first, _, rest = words.partition(" ")
        if not core.strip(" -+") or re.search(r"\\[A-Za-z]+\s*$", core):  # \angle A
            return None
        if first.lower() in _SCALES and not rest.lower().startswith(tuple(_SCALES)):
            return (core, _spelled(rest), _SCALES[first.lower()]) if not rest or _is_unit(rest, in_text) else None
        if _is_unit(words, in_text) and (in_text or not re.search(r"(?<![\\A-Za-z])[A-Za-z]", core)):
            return core, _spelled(words), 1
        return None
    return None


def _is_unit(words: str, in_text: bool) -> bool:
    parts = re.findall(r"[A-Za-z]+", words)
    if not parts or len(parts) > 5 or re.search(r"\d(?<!\^\d)(?<!\{\d)(?<!-\d)", words):
        return not words
    if any(part.lower() in _NOT_UNITS or part in _NOT_UNITS for part in parts):
        return False
    short = _SHORT | {"m", "g", "N", "J", "L", "l"} if "/" in words else _SHORT
    return in_text or all(len(part) > 2 or part in short or part.lower() in ("of", "per", "a") for part in parts)


def _spelled(unit: str) -> str:
    """Return the unit in lower case, singular and short."""
    unit = re.sub(r"\s+", " ", re.sub("[{}.]", "", unit)).strip(" .").replace(" per ", "/")
    unit = re.sub(r"\s*([/·^])\s*", r"\1", unit)
    if unit.lower() in _ALIASES:
        return _ALIASES[unit.lower()]
    unit = re.sub(r"\b(square|sq\.?|cubic|cu\.?) (\w+)", lambda m: f"{m[2]}^{2 if m[1][0] == 's' else 3}", unit)
    return re.sub(r"[A-Za-z]+", lambda match: _word(match[0]), unit)


def _word(word: str) -> str:
    word = word.lower() if len(word) > 1 else word
    singular = (
        word[:-1]
        if (len(word) > 3 or word[:-1] in _ALIASES) and word.endswith("s") and not word.endswith("ss")
        else word
    )
    return _ALIASES.get(singular, singular)
