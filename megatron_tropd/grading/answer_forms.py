r"""Reads the form of an answer: number, list, set, tuple or interval, relation, matrix, words or expression, by part.

Only rational numbers are computed; grading/comparison.py compares forms. Units, currencies and scales ("3 million") are
separated from numbers and expressions.

    read_answer(r"12\text{ cm}")  # Form(kind="number", value=Fraction(12), unit="cm")
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_tropd.grading.answer_text import canonical
from megatron_tropd.grading.answer_units import split_unit
from megatron_tropd.grading.expression_parser import rational
from megatron_tropd.grading.expressions import UnreadError, UnsureError

_LONGEST = 4000  # characters of an answer that is looked into
_DEEPEST = 6  # forms inside of forms
_DECIMAL = re.compile(r"[-+]?\s?(?:\d+(?:\.\d*)?|\.\d+)")
_GROUPED = re.compile(r"([-+]?\s?[1-9]\d{0,2}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?)(?!\d)")
_NAME = re.compile(
    r"(?:m?\s?\\(?:angle|triangle)\s*[A-Za-z]+|[A-Za-z]|\\(?:vec|hat|bar|overrightarrow)\s*\{\s*[A-Za-z]+\s*\}|\\[A-Za-z]+)(?:\^\{-1\})?(?:_\{?[A-Za-z0-9]+\}?)?'*"
    r"(?:\([A-Za-z](?:,\s?[A-Za-z])*\)|(?<=[fghA-Z])\(-?\d+(?:,\s?-?\d+)*\))?"
)
_LABEL_WORDS = r"(?:the )?(?:final |correct )?(?:answer|option|choice)\b(?: is)?\s*[:=]?\s*|therefore,?\s*"
_LABEL = re.compile(
    rf"(?:{_LABEL_WORDS}|\\text\s*\{{\s*(?:{_LABEL_WORDS}|(?!not?\b)[A-Za-z ]{{2,40}}[:=]\s*)\}}\s*)(?=\S)",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s*\b(?:and|or)\b|[,;]")
_MOMENT = re.compile(r"\d{1,2}\s?:\s?\d\d(?!\d)|\d{4}-\d\d?-\d\d?$|\d\d?/\d\d?/\d{4}$")  # times and dates
_TIME = re.compile(r"0?(\d{1,2}\s?:\s?\d\d)\s?(?:\\text\s*\{)?\s?([AaPp])\.?\s?[Mm]\.?\s?\}?")
_RELATIONS = "=<>≤≥≠≈∈"
_OPEN, _CLOSE = "([{⦃⟨", ")]}⦄⟩"
_SYSTEM = re.compile(r"\\begin\s*\{(cases|aligned|align\*?|gathered)\}(.*)\\end\s*\{\1\}", re.DOTALL)
_MATRIX = re.compile(r"\\begin\s*\{([pbBvV]?)(?:small)?matrix\}(.*)\\end\s*\{\1(?:small)?matrix\}", re.DOTALL)
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBER_WORDS = {word: number for number, word in enumerate(_WORDS.split())}
for _tens, _word in enumerate(["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"], start=2):
    NUMBER_WORDS |= {_word: 10 * _tens, **{f"{_word} {w}": 10 * _tens + NUMBER_WORDS[w] for w in _WORDS.split()[1:10]}}
_MATHEMATICAL = re.compile(r"(?<![A-Za-z])(?:sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|pi|arc\w+)(?![A-Za-z])")


@dataclass(frozen=True)
class Form:
    """An answer that was read."""

    kind: str  # number | expression | words | list | set | tuple | union | matrix | relation | text
    text: str  # canonical spelling, without the unit
    value: Fraction | None = None  # of a number
    unit: str = ""
    parts: tuple[Form, ...] = ()  # of a relation, list, set, tuple, union, or a matrix by rows
    signs: tuple[str, ...] = ()  # of a relation between its parts; brackets of a tuple; kind and width of a matrix


def read_answer(answer: str) -> Form:
    """Return the form of an answer as a person or a model wrote it."""
    return read(canonical(answer)) if len(answer) <= _LONGEST else Form("text", answer.strip())


def read(text: str, depth: int = 0) -> Form:
    """Return the form of an answer in canonical spelling."""
    text = re.sub(r"^([A-J])\)$", r"\1", _unwrapped(text))  # an option's letter
    if _DECIMAL.fullmatch(text) or ("," in text and _GROUPED.fullmatch(_unwrapped(split_unit(text)[0]))):
        return _quantity(text)
    if depth > _DEEPEST or not text or not _balanced(text):
        return Form("text", text)
    if re.fullmatch(r"\\mathbb\s*\{?\s*R\s*\}?|\\R|ℝ|all real numbers", text, re.IGNORECASE):
        return Form("tuple", text, parts=(Form("words", "-∞"), Form("words", "∞")), signs=("(", ")"))
    label = _LABEL.match(text)
    if label:
        return read(text[label.end() :], depth)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix, depth)
    system = _SYSTEM.fullmatch(text)
    if system:
        return _system(system, depth)
    time = _TIME.fullmatch(text)
    if time:
        return Form("text", time[1].replace(" ", ""), unit=time[2].lower() + "m")
    if _MOMENT.match(text):
        return Form("text", re.sub(r"^0(?=\d)", "", text))
    for reader in (_list, _relation, _union, _bracketed, _point, _either_sign):
        form = reader(text, depth)
        if form is not None:
            return form
    return _words(text) or _quantity(text)


def name_of(form: Form) -> str | None:
    """Return the name if the form is a single one (`x`, `f(x)`, `\\theta`), or "" for words that label a value."""
    if _NAME.fullmatch(form.text) and form.text not in ("e", "i", "\\frac") and not form.unit:
        return re.sub(r"[{}\s]", "", form.text)
    tuple_of_names = form.kind == "tuple" and all(_NAME.fullmatch(part.text) for part in form.parts)
    return "" if form.kind == "words" or tuple_of_names else None


def list_of(form: Form) -> Form | None:
    """Return the list that a number with commas might be: 200,300."""
    items = form.text.split(",")
    if form.kind != "number" or len(items) < 2:
        return None
    return Form("list", form.text, parts=tuple(_item(item, 0) for item in items))


def _unwrapped(text: str) -> str:
    """Take off braces and text commands that enclose the whole."""
    while True:
        text = text.strip()
        match = re.match(r"(?:\\text\s*)?\{", text)
        if not match or _closing(text, match.end() - 1) != len(text) - 1:
            return text
        text = text[match.end() : -1]


def _closing(text: str, start: int) -> int:
    """Return where the bracket at `start` closes; -1 if it does not."""
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] in _OPEN) - (text[at] in _CLOSE)
        if depth == 0:
            return at
    return -1


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth < 0:
            return False
    return depth == 0


def _outside(text: str) -> str:
    """Return the text with NUL characters for brackets and environments, and for their content."""
    text = re.sub(r"\\begin\s*\{.*\\end\s*\{[a-z]*\*?\}", lambda match: "\0" * len(match[0]), text, flags=re.DOTALL)
    depth, out = 0, []
    for character in text:
        depth += character in _OPEN
        out.append("\0" if depth else character)
        depth -= character in _CLOSE
    return "".join(out)


def _split(text: str, characters: str) -> tuple[list[str], tuple[str, ...]]:
    """Return the pieces of a text between some characters outside of brackets, and those characters."""
    places = [at for at, character in enumerate(_outside(text)) if character in characters]
    edges = [-1, *places, len(text)]
    pieces = [text[left + 1 : right].strip() for left, right in zip(edges, edges[1:], strict=False)]
    return pieces, tuple(text[at] for at in places)


def _list(text: str, depth: int) -> Form | None:
    outside = _outside(text)
    if "," not in outside and ";" not in outside and not re.search(r"and|or", text):
        return None
    # Words in \text are separators too, although they are inside braces.
    letters = list(outside)
    for match in re.finditer(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}", text):
        letters[match.start() : match.end()] = match[0]
    visible = "".join(letters)
    pattern = _SEPARATOR
    if re.search(r",\s", visible) and re.search(r"\d,\d{3}(?!\d)", visible):  # 1,234, 5,678
        pattern = re.compile(_SEPARATOR.pattern.replace("[,;]", r"(?:,\s|;)"))
    items, start = [], 0
    for match in pattern.finditer(visible):
        items.append(text[start : match.start()])
        start = match.end()
    items = [item.strip() for item in (*items, text[start:]) if item.strip()]
    if len(items) < 2:
        return None
    return Form("list", text, parts=tuple(_item(item, depth) for item in items))


def _item(text: str, depth: int) -> Form:
    """Return the form of a part of a list; `000` is the end of 1,000 and no number."""
    return Form("text", text) if re.fullmatch(r"0\d+", text) else read(text, depth + 1)


def _relation(text: str, depth: int) -> Form | None:
    pieces, signs = _split(text, _RELATIONS)
    if not signs:
        return None
    if not pieces[0] and signs[0] in "=≈" and len(pieces) == 2:  # "= 5", "≈ 3.14"
        return read(pieces[1], depth + 1)
    if not all(pieces):
        return Form("text", text)
    return _settled(Form("relation", text, parts=tuple(read(piece, depth + 1) for piece in pieces), signs=signs))


def _settled(form: Form) -> Form:
    """Cut a chain of equalities to its ends (`x = 2 + 3 = 5`), and turn `5 = x` and `2 + 3 = 5` round."""
    parts, signs = list(form.parts), list(form.signs)
    if signs.count("≈") and signs[0] == "=":  # x = π ≈ 3.14: the exact one
        cut = signs.index("≈")
        parts, signs = parts[: cut + 1], signs[:cut]
    if set(signs) == {"∈"} and len(parts) == 2 and name_of(parts[0]) is not None:
        return parts[1]
    if set(signs) - {"=", "≈"}:
        return form
    if name_of(parts[0]) is None and len(parts) == 2 and name_of(parts[1]):
        parts.reverse()
    if signs == ["≈"] and name_of(parts[0]) is None:  # 1/3 ≈ 0.33: the exact one
        return parts[0]
    named = name_of(parts[0]) is not None
    values = {part.value for part in parts[named:] if part.kind == "number"}
    if len(values) > 1:
        return Form("text", form.text)
    if name_of(parts[0]) == "":  # words, or names in a tuple, label the value
        return parts[-1]
    if parts[0].text == parts[-1].text:  # 0 = 0 says nothing
        return Form("text", form.text)
    if not named and len(values) == 1 and all(part.kind == "number" for part in parts):
        return parts[-1]
    if not named and len(parts) == 2:
        return form
    if not named:
        return Form("text", form.text)
    return Form("relation", form.text, parts=(parts[0], parts[-1]), signs=("=",))


def _union(text: str, depth: int) -> Form | None:
    pieces, signs = _split(text, "∪")
    return Form("union", text, parts=tuple(read(piece, depth + 1) for piece in pieces)) if signs else None


def _bracketed(text: str, depth: int) -> Form | None:
    if text[0] not in "([⦃⟨" or _closing(text, 0) != len(text) - 1:
        return None
    inner = read(text[1:-1], depth + 1)
    inside = _outside(text[1:-1])
    if text[0] == "⦃":
        if not text[1:-1].strip():
            return Form("words", "∅")
        if "|" in inside or ":" in inside:  # defined by a property
            return _property(text, depth)
        parts = {part.text: part for part in _items(text[1:-1], depth)}  # an element counts once
        return Form("set", text, parts=tuple(parts.values()))
    if "," in inside or ";" in inside:
        return Form(
            "tuple",
            text,
            parts=_items(text[1:-1], depth),
            signs=(text[0].replace("⟨", "("), text[-1].replace("⟩", ")")),
        )
    if inner.kind == "matrix":
        return inner
    return inner if text[0] == "(" and text[-1] == ")" and inner.kind != "list" else Form("text", text)


def _point(text: str, depth: int) -> Form | None:
    """Return the coordinates of a named point, `P(1,2)`."""
    form = _bracketed(text[1:].strip(), depth) if re.match(r"[A-Z]\s?\(", text) else None
    return form if form and form.kind == "tuple" else None


def _property(text: str, depth: int) -> Form:
    """Return the condition of `{x | x > 2}` where it is an inequality of that name alone."""
    match = re.fullmatch(r"⦃\s*([A-Za-z])\s*(?:∈\s*(?:\\mathbb\s*\{?\s*R\s*\}?|ℝ)\s*)?[|:]([^|:]*)⦄", text)
    if match is None:
        return Form("text", text)
    condition = read(match[2], depth + 1)
    inequality = condition.kind == "relation" and set(condition.signs) <= set("<>≤≥")
    return condition if inequality and match[1] in [part.text for part in condition.parts] else Form("text", text)


def _system(match: re.Match, depth: int) -> Form:
    """Return the equations of a system as a list; cases of a function, which have conditions, as text."""
    rows = [row.replace("&", " ").strip(" ,") for row in match[2].split("\\\\") if row.strip()]
    if (
        not rows
        or not all(re.search("[=<>≤≥]", row) for row in rows)
        or re.search(r"&[^&\\]*[<>≤≥]|,\s*&|\\text", match[2])
    ):
        return Form("text", re.sub(r"\s+", "", match[0]))
    parts = tuple(read(row, depth + 1) for row in rows)
    return Form("list", match[0], parts=parts) if len(parts) > 1 else parts[0]


def _items(text: str, depth: int) -> tuple[Form, ...]:
    pieces, _ = _split(text, ";" if ";" in _outside(text) else ",")
    return tuple(_item(piece, depth) for piece in pieces)


def _either_sign(text: str, depth: int) -> Form | None:
    """Return `a ± b` as the list of its two values."""
    if text.count("±") + text.count("∓") != 1:
        return None
    both = (re.sub("[±∓]", sign, text).strip().removeprefix("+") for sign in "+-")
    return Form("list", text, parts=tuple(read(one, depth + 1) for one in both))


def _matrix(match: re.Match, depth: int) -> Form:
    rows = [row for row in match[2].split("\\\\") if row.strip()]
    cells = [[read(cell, depth + 1) for cell in row.split("&")] for row in rows]
    if not cells or len({len(row) for row in cells}) > 1:
        return Form("text", match[0])
    kind = "determinant" if match[1] in ("v", "V") else "matrix"
    return Form(
        "matrix", match[0], parts=tuple(cell for row in cells for cell in row), signs=(kind, str(len(cells[0])))
    )


def _words(text: str) -> Form | None:
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text)
    bare = re.sub(r"\s+", " ", bare).strip(" .'\"")
    bare = re.sub(r"^(?:an?|the)\s+(?=[a-z]{2})", "", bare, flags=re.IGNORECASE)
    bare = re.sub(r"(?<=[a-z])-(?=[a-z]{2})", " ", bare)
    if re.fullmatch(r"[-+]?\s*(?:∞|infinity|inf|infty)", bare, re.IGNORECASE):
        return Form("words", "-∞" if bare[0] == "-" else "∞")
    if bare in ("∅",) or bare.lower() == "empty set":
        return Form("words", "∅")
    signed = re.match(r"(minus|negative|plus|positive)\s+(?=\S)", bare, re.IGNORECASE)
    if signed and not re.fullmatch(r"[A-Za-z ]+", bare[signed.end() :]):
        sign = "-" if signed[1].lower() in ("minus", "negative") else ""
        return _quantity(sign + bare[signed.end() :])
    if not re.fullmatch(r"[^\W\d_][^\W\d_ .'’-]*(?:[ .'-]+[^\W\d_]+)*", bare) or _MATHEMATICAL.search(bare):
        return None
    if len(bare) == 1:
        return Form("expression", bare)
    if bare.lower() in NUMBER_WORDS:
        return Form("number", bare, value=Fraction(NUMBER_WORDS[bare.lower()]))
    return Form("words", bare.lower())


def _quantity(text: str) -> Form:
    """Return a number or expression, with its unit."""
    degrees = "°" in text and _MATHEMATICAL.search(text)  # an angle inside of a function
    core, unit, scale = (text, "", 1) if degrees else split_unit(text)
    core = _unwrapped(core)
    grouped = _GROUPED.fullmatch(core)
    plain = re.sub(r"[ ,](?=\d{3})", "", core) if grouped else core
    try:
        value = Fraction(plain.replace(" ", "")) if len(plain) < 1000 and _DECIMAL.fullmatch(plain) else rational(plain)
    except (UnreadError, UnsureError):
        value = None
    if value is None:
        return Form("expression" if scale == 1 else "text", core if scale == 1 else text, unit=unit)
    return Form("number", core, value=value * scale, unit=unit)
