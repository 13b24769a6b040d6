r"""Decides whether two expressions or relations are equal: exactly if they are rational, else to many digits.

Values are compared at fixed points, some of them negative. No CUDA, torch or Megatron is imported: grading/worker.py
runs this under limits of time and memory.

    same_value("x+1", "1+x")  # True
"""

from __future__ import annotations

import random
from fractions import Fraction
from typing import Any

from megatron_tropd.grading.expression_parser import parse
from megatron_tropd.grading.expressions import LARGEST, Node, UnsureError, exact, names

_DIGITS = 50  # and as many as the expressions have: a decimal of many digits is still not π
_UNSURE_DIGITS = 15  # of those, lost to rounding
_CONSTANTS = {"pi", "e", "i"}


def same_value(left: str, right: str) -> bool:
    """Whether two expressions have the same value for all values of their names."""
    first, second = parse(left), parse(right)
    values = exact(first), exact(second)
    if None not in values:
        return values[0] == values[1]
    _set_digits(left, right)
    pairs = [(a, b) for a, b in _values((first, second)) if _comparable(first, second, a, b)]
    needed = 3 if (names(first) | names(second)) - _CONSTANTS else 1
    if len(pairs) < needed:
        raise UnsureError("too few points where both sides are defined")
    return all(_close(a, b) for a, b in pairs)


def same_relation(left: str, right: str, ordered: bool) -> bool:
    """Whether `left` = 0 and `right` = 0 are one equation up to a factor; `ordered`: < 0, up to a positive factor."""
    first, second = parse(left), parse(right)
    if not (names(first) | names(second)) - _CONSTANTS:
        raise UnsureError("a relation between numbers")
    _set_digits(left, right)
    ratios = [a / b for a, b in _values((first, second)) if a != 0 and b != 0]
    if len(ratios) < 3:
        raise UnsureError("too few points where both sides are defined")
    constant = all(_close(ratio, ratios[0]) for ratio in ratios)
    return constant and ratios[0].imag == 0 and (not ordered or ratios[0].real > 0)


def _set_digits(left: str, right: str) -> None:
    from mpmath import mp

    mp.dps = _DIGITS + max(len(left), len(right))


def _comparable(first: Node, second: Node, a: Any, b: Any) -> bool:
    """Whether a point counts: real functions are compared where both are real."""
    return "i" in names(first) | names(second) or (a.imag == 0 and b.imag == 0)


def _close(a: Any, b: Any) -> bool:
    from mpmath import mp

    unit = mp.mpf(10) ** (_UNSURE_DIGITS - mp.dps)
    return abs(a - b) <= max(abs(a) + abs(b), 1) * unit


def _values(nodes: tuple[Node, ...]) -> list[tuple[Any, ...]]:
    """Return the nodes' values at fixed points, without the points where one of them is not defined."""
    from mpmath import mp

    free = sorted(set().union(*(names(node) for node in nodes)) - _CONSTANTS)
    draw = random.Random(20260609)
    found = []
    for point in range(8 if free else 1):
        low = -3 if point % 2 else 0
        at = {name: mp.mpf(draw.randrange(1, 10**12)) / 10**12 * (3 - low) + low for name in free}
        try:
            found.append(tuple(_numeric(node, at, mp) for node in nodes))
        except (ZeroDivisionError, ValueError, OverflowError):
            continue
    return [values for values in found if all(mp.isfinite(value) for value in values)]


def _numeric(node: Node, at: dict[str, Any], mp: Any) -> Any:
    kind: str = node[0]
    if kind == "number":
        return mp.mpf(node[1].numerator) / node[1].denominator
    if kind == "name":
        return at[node[1]]
    if kind == "constant":
        return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node[1]]
    if kind in ("^", "root"):
        return _numeric_power(node, at, mp)
    values = [_numeric(child, at, mp) for child in node[1:]]
    if kind == "log" and len(values) == 1:
        return mp.log(values[0]) * at["log base"]
    if kind in _BINARY:
        return _BINARY[kind](mp, *values)
    (value,) = values
    if kind in ("factorial", "exp", "sinh", "cosh", "tanh") and abs(value) > 1000:
        raise UnsureError("a number that is too large")
    if kind in ("sin", "cos", "tan", "cot", "sec", "csc") and abs(value) > 10**9:
        raise UnsureError("an angle that is too large")
    if kind in ("arcsin", "arccos", "arctan"):
        kind = kind.replace("arc", "a")
    kind = {"ln": "log", "abs": "fabs", "negative": "fneg"}.get(kind, kind)
    return getattr(mp, kind)(value)


def _binomial(mp: Any, n: Any, k: Any) -> Any:
    if abs(n) > 1000 or abs(k) > 1000:
        raise UnsureError("a binomial coefficient that is too large")
    return mp.binomial(n, k)


_BINARY = {
    "+": lambda mp, a, b: a + b,
    "*": lambda mp, a, b: a * b,
    "/": lambda mp, a, b: a / b,
    "binom": _binomial,
    "log": lambda mp, base, x: mp.log(x) / mp.log(base),
}


def _numeric_power(node: Node, at: dict[str, Any], mp: Any) -> Any:
    """Return a power or root; odd roots of negative numbers are the real ones."""
    exponent_node = node[2] if node[0] == "^" else ("/", ("number", Fraction(1)), node[1])
    base = _numeric(node[1] if node[0] == "^" else node[2], at, mp)
    exponent, fraction = _numeric(exponent_node, at, mp), exact(exponent_node)
    if abs(exponent) > LARGEST:
        raise UnsureError("an exponent that is too large")
    if base == 0 and (mp.im(exponent) != 0 or exponent <= 0):
        raise ZeroDivisionError
    if fraction is not None and fraction.denominator == 1:
        return base ** int(fraction)
    if fraction is not None and fraction.denominator % 2 and mp.im(base) == 0 and mp.re(base) < 0:
        return (-1) ** fraction.numerator * abs(base) ** exponent
    return base**exponent
