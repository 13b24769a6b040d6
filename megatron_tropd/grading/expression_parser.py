r"""Parses a mathematical expression, LaTeX or plain, into a tree (grading/expressions.py). Nothing is guessed.

Ambiguous input (`1/2x`, `\frac123`) raises UnsureError, unknown input UnreadError. The text is in the spelling of
grading/answer_text.py.

    rational(r"1\frac{1}{2}")  # Fraction(3, 2)
"""

from __future__ import annotations

from fractions import Fraction

from megatron_tropd.grading.expression_tokens import tokens
from megatron_tropd.grading.expressions import LONGEST, Node, UnreadError, UnsureError, exact, number, repeating


def rational(text: str) -> Fraction | None:
    """Return the exact value of a rational expression without names, else None. UnreadError or UnsureError as named."""
    return exact(parse(text))


def parse(text: str) -> Node:
    """Return the tree of one expression in canonical spelling (grading/answer_text.py)."""
    if len(text) > LONGEST:
        raise UnsureError(f"longer than {LONGEST} characters")
    return _Parser(text).whole()


def _ends_in_factorial(node: Node) -> bool:
    return node[0] == "factorial" or (node[0] == "*" and _ends_in_factorial(node[2]))


def _first_name(node: Node) -> str | None:
    """Return the name that a product begins with."""
    while node[0] in ("*", "^"):
        node = node[1]
    return node[1] if node[0] == "name" else None


class _Parser:
    def __init__(self, text: str):
        self._tokens = tokens(text)
        self._at = 0
        self._bars = 0  # absolute values that are open

    def whole(self) -> Node:
        node = self._sum()
        self._spaces()
        if self._at < len(self._tokens):
            raise UnreadError(self._tokens[self._at][1])
        return node

    def _spaces(self) -> bool:
        there = self._at < len(self._tokens) and self._tokens[self._at][0] == "space"
        self._at += there
        return there

    def _peek(self, skip: bool = True) -> tuple[str, str]:
        at = self._at
        if skip and at < len(self._tokens) and self._tokens[at][0] == "space":
            at += 1
        return self._tokens[at] if at < len(self._tokens) else ("end", "")

    def _take(self) -> tuple[str, str]:
        self._spaces()
        token = self._peek()
        self._at += 1
        return token

    def _next_is(self, *signs: str) -> bool:
        kind, value = self._peek()
        return kind == "sign" and value in signs

    def _expect(self, sign: str) -> None:
        if self._take() != ("sign", sign):
            raise UnreadError(f"{sign} is missing")

    def _sum(self) -> Node:
        node = self._signed()
        while self._next_is("+", "-"):
            sign = self._take()[1]
            node = ("+", node, self._product() if sign == "+" else ("negative", self._product()))
        return node

    def _signed(self) -> Node:
        negative = False
        while self._next_is("+", "-"):
            negative ^= self._take()[1] == "-"
        node = self._product()
        return ("negative", node) if negative else node

    def _product(self) -> Node:
        node = self._mixed()
        slash = False
        while True:
            if self._next_is("*", "×", "·"):
                cross = self._take()[1] == "×"
                factor = self._operand()
                if cross and node[0] == factor[0] == "name":
                    raise UnsureError("a product of numbers, or of vectors")
                node = ("*", node, factor)
            elif self._next_is("/", "÷"):
                self._take()
                node, slash = ("/", node, self._operand()), True
            elif self._starts_factor():
                if slash:
                    raise UnsureError("a factor without a sign after a slash")
                if self._peek()[0] in ("number", "repeating") and not _ends_in_factorial(node):
                    raise UnsureError("a number without a sign before it")
                node = ("*", node, self._power())
            else:
                return node

    def _operand(self) -> Node:
        """Return what follows a sign of multiplication or division, perhaps negative."""
        if self._next_is("-"):
            self._take()
            return ("negative", self._mixed())
        return self._mixed()

    def _mixed(self) -> Node:
        """Return a mixed number (`1\\frac{1}{2}`, `2 3/4`), else a factor."""
        start = self._at
        kind, whole = self._peek()
        if kind == "number" and whole.isdigit():
            self._take()
            if self._peek() == ("function", "frac"):
                return self._with_fraction(whole, self._power())
            if self._peek(skip=False)[0] == "space" and self._peek()[0] == "number":
                parts = [self._take(), self._take(), self._take()]
                if [p[0] for p in parts] == ["number", "sign", "number"] and parts[1][1] == "/":
                    over, under = (("number", number(parts[i][1])) for i in (0, 2))
                    return self._with_fraction(whole, ("/", over, under))
            self._at = start
        return self._power()

    def _with_fraction(self, whole: str, fraction: Node) -> Node:
        whole_numbers = fraction[0] == "/" and all(n[0] == "number" and n[1].denominator == 1 for n in fraction[1:])
        if whole_numbers:
            if not 0 < fraction[1][1] < fraction[2][1]:  # 2\frac{3}{2}: product or mixed number?
                raise UnsureError("an integer before a fraction that is not proper")
            return ("+", ("number", number(whole)), fraction)
        return ("*", ("number", number(whole)), fraction)

    def _starts_factor(self) -> bool:
        kind, value = self._peek()
        if kind == "sign":
            return value in "({[π√" or (value == "|" and not self._bars)
        return kind in ("number", "repeating", "name") or (kind == "function" and value not in ("rfloor", "rceil"))

    def _power(self) -> Node:
        node = self._primary()
        if self._next_is("!"):
            self._take()
            node = ("factorial", node)
            if self._next_is("!"):
                raise UnsureError("a double factorial")
        if self._next_is("°"):
            self._take()
            return ("*", node, ("/", ("constant", "pi"), ("number", Fraction(180))))
        if self._next_is("^"):
            self._take()
            exponent = self._exponent()
            if self._next_is("^", "!"):
                raise UnsureError("a power of a power, or a factorial, without braces")
            node = ("^", node, exponent)
        return node

    def _exponent(self) -> Node:
        if self._next_is("-"):
            self._take()
            return ("negative", self._primary())
        return self._primary()

    def _primary(self) -> Node:
        kind, value = self._take()
        if kind == "number":
            return ("number", number(value))
        if kind == "repeating":
            return ("number", repeating(value))
        if kind == "name":
            return self._name(value)
        if kind == "function":
            return self._function(value)
        if value == "π":
            return ("constant", "pi")
        if value == "√":
            return ("root", ("number", Fraction(2)), self._primary())
        if value in ("(", "[", "{"):
            bars, self._bars = self._bars, 0
            node = self._sum()
            self._bars = bars
            self._expect({"(": ")", "[": "]", "{": "}"}[value])
            return node
        if value == "|":
            self._bars += 1
            node = self._sum()
            self._bars -= 1
            self._expect("|")
            return ("abs", node)
        raise UnreadError(value or "the end")

    def _name(self, name: str) -> Node:
        if self._next_is("_"):
            self._take()
            kind, index = self._take()
            if (kind, index) == ("sign", "{"):
                kind, index = self._take()
                self._expect("}")
            if kind not in ("number", "name"):
                raise UnreadError("an index that is an expression")
            return ("name", f"{name}_{index}")
        return ("constant", name) if name in ("e", "i") else ("name", name)

    def _argument(self) -> Node:
        """Return an argument of a LaTeX command: a group, or one digit or name (`\\frac12`)."""
        kind, value = self._peek()
        if kind != "number":
            return self._primary()
        self._spaces()
        if not value.isdigit():
            raise UnsureError("a decimal number as an argument without braces")
        rest = value[1:]
        if rest:
            self._tokens[self._at] = ("number", rest)
        else:
            self._at += 1
        return ("number", Fraction(int(value[0])))

    def _function(self, name: str) -> Node:
        if name in ("frac", "binom"):
            node = ("/" if name == "frac" else "binom", self._argument(), self._argument())
            if _first_name(node[1]) == _first_name(node[2]) == "d":
                raise UnsureError("a quotient, or a derivative")
            if self._peek(skip=False)[0] == "number":
                raise UnsureError(f"a digit after the arguments of {name}")
            return node
        if name == "sqrt":
            return self._root()
        if name in ("lfloor", "lceil"):
            node = self._sum()
            if self._take() != ("function", "r" + name[1:]):
                raise UnreadError(f"{name} is not closed")
            return (name[1:], node)
        return self._applied(name)

    def _root(self) -> Node:
        degree: Node = ("number", Fraction(2))
        if self._next_is("["):
            self._take()
            degree = self._sum()
            self._expect("]")
        node = ("root", degree, self._argument())
        if self._peek(skip=False)[0] == "number":
            raise UnsureError("a digit after a root")
        return node

    def _applied(self, name: str) -> Node:
        base: Node | None = ("number", Fraction(10)) if name == "lg" else None
        power: Node | None = None
        if self._next_is("_") and name == "log":
            self._take()
            base = self._argument()
        if self._next_is("^"):
            self._take()
            power = self._argument() if not self._next_is("-") else self._exponent()
        argument = self._function_argument()
        name = "arc" + name[1:] if name in ("asin", "acos", "atan") else name
        if power is not None and exact(power) == -1:  # sin^{-1} x
            if name not in ("sin", "cos", "tan"):
                raise UnsureError(f"{name} to the power of -1")
            return ("arc" + name, argument)
        node = ("log", base, argument) if name in ("log", "lg") and base else (name, argument)
        return node if power is None else ("^", node, power)

    def _function_argument(self) -> Node:
        if self._next_is("(", "{", "["):
            node = self._primary()
            if self._next_is("^", "!"):
                raise UnsureError("a power after a function's argument")
            return node
        node = self._power()
        while self._peek()[0] == "name" or self._next_is("π"):  # \sin 2x
            node = ("*", node, self._power())
        if self._next_is("/", "(", "*", "·", "×"):
            raise UnsureError("where a function's argument ends")
        return node
