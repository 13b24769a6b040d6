r"""Cuts an expression into tokens: numbers, names of one letter or Greek, functions, signs and spaces.

tokens(r"2\pi x")  # [("number", "2"), ("sign", "π"), ("space", " "), ("name", "x")]
"""

from __future__ import annotations

import re

from megatron_tropd.grading.expressions import UnreadError, UnsureError

_MOST_TOKENS = 300  # a sum of this many terms makes a tree of that depth, which recursion must bear
_DEEPEST = 40  # nested braces and parentheses
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "ln", "log", "exp", "lg"} | {
    f"{prefix}{name}" for prefix in ("arc", "a") for name in ("sin", "cos", "tan")
}
_GREEK = {
    *(
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "varepsilon",
        "zeta",
        "eta",
        "theta",
        "vartheta",
        "kappa",
        "lambda",
    ),
    *("mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega", "Delta", "Omega", "Phi", "ell"),
}
_TOKEN = re.compile(
    r"(?P<repeating>\d*\.\d*\\(?:overline|bar|dot)\{\d+\})"
    r"|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
    r"|\\text\s*\{\s*(?P<word>[A-Za-z]+|\d+)\s*\}|\\(?P<command>[A-Za-z]+)|(?P<letters>[A-Za-z]+)"
    r"|(?P<sign>[-+*/^_!(){}\[\]|×·÷π√°])|(?P<space>\s+)"
)


def tokens(text: str) -> list[tuple[str, str]]:
    """Return (kind, text) of every token. UnreadError for what is none, UnsureError for what is too much."""
    found: list[tuple[str, str]] = []
    start, depth = 0, 0
    while start < len(text):
        match = _TOKEN.match(text, start)
        if not match:
            raise UnreadError(text[start])
        kind, value = match.lastgroup or "sign", match[match.lastgroup or 0]
        depth += (value in "({[") - (value in ")}]") if kind == "sign" else 0
        if depth > _DEEPEST:
            raise UnsureError(f"deeper than {_DEEPEST}")
        found += _named(kind, value)
        if len(found) > _MOST_TOKENS:
            raise UnsureError(f"longer than {_MOST_TOKENS} tokens")
        start = match.end()
    return found


def _named(kind: str, value: str) -> list[tuple[str, str]]:
    """Return the tokens of a command or of a run of letters: a function, a constant, or names one letter each."""
    if kind == "word" and value.isdigit():
        return [("number", value)]
    if kind not in ("word", "command", "letters"):
        return [(kind, value)]
    if value in _FUNCTIONS or value in ("sqrt", "frac", "binom", "lfloor", "rfloor", "lceil", "rceil"):
        return [("function", value)]
    if value == "pi":
        return [("sign", "π")]
    if value in _GREEK and kind == "command":
        return [("name", "\\" + value)]
    if any(value.startswith(function) for function in _FUNCTIONS | {"sqrt", "pi", "inf"}):  # lnx
        raise UnreadError(value)
    if kind == "command" or len(value) > 3 or (kind == "word" and len(value) > 1):
        raise UnreadError(value)
    return [("name", letter) for letter in value]
