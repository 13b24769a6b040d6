r"""Decides whether two answers are equal, by their forms; `ask` answers algebra that the forms do not settle.

Careful rather than generous: sets and lists have no order, but tuples, intervals and matrices do; if both have units,
these must agree; a percent sign counts as a unit (`50\%` is 50, not 0.5); a rounded decimal is not the exact value.

    same_answer("x=5", "5")  # True
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from megatron_tropd.grading.answer_forms import NUMBER_WORDS, Form, list_of, name_of, read_answer

# ask(kind, left, right): "value" compares expressions, "equation" left = 0 with right = 0, "inequality" left < 0 with
# right < 0; None if it cannot say.
Ask = Callable[[str, str, str], bool | None]

_FLIPPED = str.maketrans("<>≤≥", "><≥≤")
_CHOICE = re.compile(
    r"\$?\s*(?:\\(?:text|textbf|textrm|mathrm|mathbf|mbox|bf)\s*\{\s*)?"
    r"(?:\(\s*(?P<round>[A-J])\s*\)|(?P<bare>[A-J])\s*[).:](?=[\s}]))\s*(?P<closed>\})?\s*(?P<content>\S.*)",
    re.DOTALL,
)
_NO_CONTENT = re.compile(
    r"^(?:[+*/^=<>,&]|-\s|(?:or|and)\b|\\(?:cdot|times|text\{\s*(?:or|and)))|\(\s*[A-J]\s*\)"
)  # (A) or (B)
_MOST_PARTS = 200  # of a list that is compared without order


def same_answer(found: str, answer: str, ask: Ask | None = None) -> bool:
    """Whether `found` is the known `answer`; without `ask`, expressions are equal only where they are written alike."""
    ask = ask or _silent
    left, right = read_answer(found), read_answer(answer)
    if _same(left, right, ask):
        return True
    return _same_choice(found, answer, right, ask) or _same_choice(answer, found, left, ask)


def _silent(kind: str, left: str, right: str) -> bool | None:
    return None


def _same_choice(labelled: str, other: str, other_form: Form, ask: Ask) -> bool:
    r"""Whether `labelled` is a letter with its content, `\textbf{(B) }12`, and `other` one of the two."""
    match = _CHOICE.match(labelled[:4000].strip())
    if not match:
        return False
    content = match["content"].strip().rstrip("$").strip()
    if _NO_CONTENT.search(content):
        return False
    if content.endswith("}") and content.count("{") < content.count("}"):
        content = content[:-1]
    letter = match["round"] or match["bare"]
    chosen = re.fullmatch(r"\W*(?:\\text\w*\{)?\(?([A-J])\)?[.}]*", other)
    if chosen:
        return chosen[1] == letter
    in_dress = labelled.lstrip(" $").startswith("\\") or re.match(r"\s*\(?[A-J][).:]\s", labelled)
    return bool(in_dress and content) and _same(read_answer(content), other_form, ask)


def _same(left: Form, right: Form, ask: Ask) -> bool:
    if left.kind == right.kind == "number":
        return left.value == right.value and _same_unit(left, right)
    if left.kind == right.kind and _key(left) == _key(right) and left.signs == right.signs:
        return _same_unit(left, right)
    for one, other in ((left, right), (right, left)):
        if one.kind == "set" and len(one.parts) == 1 and other.kind not in ("set", "list", "relation"):
            return _same(one.parts[0], other, ask)
    if "relation" in (left.kind, right.kind):
        return _same_relation(left, right, ask)
    for one, other in ((left, right), (right, left)):
        listed = list_of(one) if one.kind == "number" and other.kind == "list" else None
        if listed:
            return _same_parts(listed, other, ask)
        if one.kind == "union" and other.kind == "list":
            intervals = [_interval(part) if part.kind == "relation" else part for part in other.parts]
            said_so = re.search(r"\bor\b", other.text) or any(part.kind == "relation" for part in other.parts)
            tuples = tuple(interval for interval in intervals if interval and interval.kind == "tuple")
            if said_so and len(tuples) == len(intervals):
                return _same_parts(one, replace(other, parts=tuples), ask)
        if one.kind == "list" and _values(one, other):
            return _same_in_order(_values(one, other), other.parts, ask)
    if {left.kind, right.kind} <= {"list", "set"} or left.kind == right.kind == "union":
        return _same_parts(left, right, ask)
    if left.kind == right.kind and left.kind in ("tuple", "matrix"):
        return left.signs == right.signs and _same_in_order(left.parts, right.parts, ask)
    if {left.kind, right.kind} <= {"number", "expression"}:
        return _same_unit(left, right) and bool(_ask_value(left, right, ask))
    return False


def _same_unit(left: Form, right: Form) -> bool:
    return not left.unit or not right.unit or left.unit == right.unit


def _ask_value(left: Form, right: Form, ask: Ask) -> bool | None:
    """Ask for algebra, unless both sides are all letters (`AB` is a name, not a product) or one has another base."""
    if all(re.fullmatch(r"[A-Za-z]+", form.text) for form in (left, right)):
        return False
    if any(re.search(r"\d\s*_", form.text) for form in (left, right)):
        return False
    return ask("value", left.text, right.text)


def _key(form: Form) -> str:
    """Return the text without what does not matter: text commands, braces of one sign, spaces but between digits."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", form.text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(?<=\d_)\{\s?([a-z]+)\s?\}", lambda base: str(NUMBER_WORDS.get(base[1], base[0])), text)
    text = re.sub(r"(?<=[\^_])\{(\w)\}(?!\w)", r"\1", text)
    text = re.sub(r"(?<![A-Za-z0-9.]) | (?![A-Za-z0-9.])", "", text)
    text = re.sub(r"\b([AaPp])\.([Mm])\b\.?", r"\1\2", text)
    return re.sub(r"(?<!\\)\b[A-Za-z]{2,}\b\.?", lambda match: match[0].lower().rstrip("."), text)


def _same_in_order(left: tuple[Form, ...], right: tuple[Form, ...], ask: Ask) -> bool:
    return len(left) == len(right) and all(_same(a, b, ask) for a, b in zip(left, right, strict=True))


def _values(form: Form, other: Form) -> tuple[Form, ...]:
    """Return the values of `x = 1, y = 2` by the order of the names, where `other` may be those values without names.

    That is a tuple; a list too if the names differ by their index alone (`x_1 = 1, x_2 = 2`).
    """
    named = {name_of(part.parts[0]) or "": part.parts[-1] for part in form.parts if part.signs == ("=",)}
    if not all(re.fullmatch(r"[A-Za-z](?:_\w)?", name) for name in named) or len(named) < len(form.parts):
        return ()
    one_letter = len({name[0] for name in named}) == 1 and not any(part.kind == "relation" for part in other.parts)
    fits = other.signs == ("(", ")") or (other.kind == "list" and one_letter)
    return tuple(named[name] for name in sorted(named)) if fits else ()


def _same_parts(left: Form, right: Form, ask: Ask) -> bool:
    """Whether two lists, sets or unions have the same parts in any order."""
    left, right = _distributed(left), _distributed(right)
    if len(left.parts) != len(right.parts) or len(left.parts) > _MOST_PARTS:
        return False
    names = [{name_of(part.parts[0]) for part in form.parts if part.kind == "relation"} for form in (left, right)]
    if names[0] != names[1] and any(len(some) > 1 for some in names):  # x=1, y=2 and 2, 1
        return False
    missing = list(right.parts)
    for part in left.parts:
        match = next((other for other in missing if _same(part, other, ask)), None)
        if match is None:
            return False
        missing.remove(match)
    return True


def _distributed(form: Form) -> Form:
    """Return `x = 1, 2` as `x = 1, x = 2`, and `1, ± 2` as three parts."""
    parts: list[Form] = []
    for part in form.parts:
        if part.kind == "relation" and part.parts[-1].kind == "list" and part.signs == ("=",):
            parts += [replace(part, parts=(part.parts[0], one), text="") for one in part.parts[-1].parts]
        else:
            parts += part.parts if part.kind == "list" else [part]
    first = parts[0]
    if first.kind == "relation" and first.signs == ("=",) and not any(p.kind == "relation" for p in parts[1:]):
        parts = [first, *(Form("relation", "", parts=(first.parts[0], p), signs=("=",)) for p in parts[1:])]
    return replace(form, parts=tuple(parts))


def _same_relation(left: Form, right: Form, ask: Ask) -> bool:
    if left.kind != "relation":
        left, right = right, left
    if right.kind != "relation":
        if left.signs == ("=",) and name_of(left.parts[0]):
            return _same(left.parts[1], right, ask)
        interval = _interval(left)
        return interval is not None and _same(interval, right, ask)
    names = name_of(left.parts[0]), name_of(right.parts[0])
    if left.signs == right.signs == ("=",) and names[0] and names[0] == names[1]:
        return _same(left.parts[1], right.parts[1], ask)
    left, right = _ascending(left), _ascending(right)
    if left.signs != right.signs:
        return False
    if _same_in_order(left.parts, right.parts, ask):
        return True
    if len(left.signs) != 1 or left.signs[0] not in "=≠<≤":
        return False
    differences = [f"({form.parts[0].text})-({form.parts[1].text})" for form in (left, right)]
    return ask("inequality" if left.signs[0] in "<≤" else "equation", *differences) is True


def _ascending(form: Form) -> Form:
    """Return a relation with its inequalities as < and ≤."""
    if not set(form.signs) <= set("<>≤≥=") or not set(form.signs) & set(">≥"):
        return form
    signs = tuple(sign.translate(_FLIPPED) for sign in reversed(form.signs))
    return replace(form, parts=form.parts[::-1], signs=signs)


def _interval(form: Form) -> Form | None:
    """Return the interval that inequalities of one name say: `x ≥ 5` is [5, ∞)."""
    form = _ascending(form)
    names = [bool(name_of(part)) for part in form.parts]
    if not set(form.signs) <= {"<", "≤"} or names.count(True) != 1 or len(form.parts) > 3:
        return None
    at = names.index(True)
    if len(form.parts) == 3 and at != 1:
        return None
    low = form.parts[0] if at else Form("words", "-∞")
    high = form.parts[-1] if at < len(form.parts) - 1 else Form("words", "∞")
    opened = "(" if not at or form.signs[0] == "<" else "["
    closed = ")" if at == len(form.parts) - 1 or form.signs[-1] == "<" else "]"
    return Form("tuple", form.text, parts=(low, high), signs=(opened, closed))
