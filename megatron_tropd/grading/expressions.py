"""A mathematical expression as a tree of tuples, and its exact value where it is rational.

Work is bounded: an exact number that would take more than 20,000 bits raises UnsureError.

    exact(("/", ("number", Fraction(1)), ("number", Fraction(2))))  # Fraction(1, 2)
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import reduce
from typing import Any

Node = tuple[Any, ...]  # ("number", Fraction) | ("name", str) | ("constant", str) | (operation, Node, ...)

LARGEST = 20_000  # bits of an exact number, and largest exponent of a power
LONGEST = 2000  # characters of an expression, digits of a number


class UnreadError(Exception):
    """The expression has parts that this module does not know."""


class UnsureError(Exception):
    """The expression can be read in two ways, or is too large."""


def number(text: str) -> Fraction:
    """Return a decimal number's exact value, `1.5e3` too."""
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > LONGEST or len(exponent) > 5 or abs(int(exponent or 0)) > LARGEST // 4:
        raise UnsureError("a number with too many digits")
    return Fraction(mantissa.rstrip(".") if mantissa.endswith(".") else mantissa) * Fraction(10) ** int(exponent or 0)


def repeating(text: str) -> Fraction:
    r"""Return the value of a repeating decimal, `0.1\overline{6}`."""
    head, _, block = text.rstrip("}").partition("\\")
    block = block.partition("{")[2]
    places = len(head.partition(".")[2])
    return Fraction(head.rstrip(".") or "0") + Fraction(int(block), (10 ** len(block) - 1) * 10**places)


def names(node: Node) -> set[str]:
    """Return the names and constants that a value depends on."""
    if node[0] in ("number", "constant"):
        return {node[1]} if node[0] == "constant" else set()
    if node[0] == "name":
        return {node[1]}
    # A logarithm without a base has an unknown base, the same in the whole expression.
    free = {"log base"} if node[0] == "log" and len(node) == 2 else set()
    return reduce(set.union, (names(child) for child in node[1:]), free)


def exact(node: Node) -> Fraction | None:
    """Return a rational expression's value, None if it has names or irrational parts; UnsureError if too large."""
    kind = node[0]
    if kind == "number":
        return node[1]
    if kind not in ("+", "*", "/", "^", "negative", "factorial"):
        return None
    found = [exact(child) for child in node[1:]]
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return None
    if kind == "negative":
        return -values[0]
    if kind == "factorial":
        if values[0].denominator > 1 or values[0] < 0 or values[0] > 500:
            raise UnsureError("a factorial")
        return Fraction(math.factorial(int(values[0])))
    left, right = values
    if kind == "/" and right == 0:
        raise UnsureError("a division by zero")
    if kind == "^":
        return _exact_power(left, right)
    result = left + right if kind == "+" else left * right if kind == "*" else left / right
    if result.numerator.bit_length() + result.denominator.bit_length() > LARGEST:
        raise UnsureError("a number with too many digits")
    return result


def _exact_power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator > 1:
        return None
    size = (base.numerator.bit_length() + base.denominator.bit_length()) * abs(exponent)
    if size > LARGEST or (base == 0 and exponent <= 0):
        raise UnsureError("a power that is too large or not defined")
    return base ** int(exponent)
