r"""Normalises the spelling of an answer: Unicode, LaTeX and Markdown become one small alphabet, in linear time.

Signs that LaTeX, Unicode and keyboards write differently become one character each (`\leq`, `<=` and `≤` are `≤`), the
braces of sets become `⦃ ⦄`, every font or text command becomes `\text{...}`. Nothing is computed here.

    canonical(r"$x \le \dfrac{1}{2}$")  # "x ≤ \frac{1}{2}"
"""

from __future__ import annotations

import re
import unicodedata

_SIGNS = {
    **dict.fromkeys(("times",), "×"),
    **dict.fromkeys(("cdot", "ast", "bullet"), "·"),
    **{"div": "÷", "pi": "π", "infty": "∞", "cup": "∪", "cap": "∩", "pm": "±", "mp": "∓", "in": "∈", "to": "→"},
    **dict.fromkeys(("rightarrow", "longrightarrow"), "→"),
    **dict.fromkeys(("le", "leq", "leqslant", "leqq"), "≤"),
    **dict.fromkeys(("ge", "geq", "geqslant", "geqq"), "≥"),
    **dict.fromkeys(("ne", "neq"), "≠"),
    **dict.fromkeys(("approx", "simeq", "thickapprox"), "≈"),
    **dict.fromkeys(("emptyset", "varnothing"), "∅"),
    **dict.fromkeys(("ldots", "dots", "cdots", "dotsc", "dotsb"), "…"),
    **dict.fromkeys(("lbrace", "{"), "⦃"),
    **dict.fromkeys(("rbrace", "}"), "⦄"),
    **{"langle": "⟨", "rangle": "⟩", "lt": "<", "gt": ">", "colon": ":", "%": "%", "$": "\ue000", "&": "&", "#": "#"},
    **dict.fromkeys(("lor", "vee"), r"\text{ or }"),
    **dict.fromkeys(("land", "wedge"), r"\text{ and }"),
    **dict.fromkeys(("lvert", "rvert", "vert", "mid"), "|"),
    **dict.fromkeys(("lbrack",), "["),
    **dict.fromkeys(("rbrack",), "]"),
    **dict.fromkeys(("degree", "textdegree"), "°"),
    **dict.fromkeys(("pounds", "textsterling"), "£"),
    **dict.fromkeys(("dfrac", "tfrac", "cfrac", "sfrac", "nicefrac", "frac"), "\\frac"),
    **dict.fromkeys(("dbinom", "tbinom", "binom"), "\\binom"),
    **dict.fromkeys(("text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "textup"), "\\text"),
    **dict.fromkeys(("mbox", "hbox", "mathrm", "mathbf", "mathit", "mathsf", "operatorname", "bm", "emph"), "\\text"),
    "ensuremath": "\\text",
    **dict.fromkeys(("boldsymbol", "underline", "boxed", "fbox", "pmb"), "\\text"),
    **dict.fromkeys((",", ";", ":", " ", ">", "quad", "qquad", "thinspace", "enspace", "thickspace"), " "),
    **dict.fromkeys(("left", "right", "big", "Big", "bigg", "Bigg", "bigl", "bigr", "Bigl", "Bigr", "biggl"), ""),
    **dict.fromkeys(("biggr", "displaystyle", "textstyle", "limits", "!", "(", ")", "[", "]", "bf", "rm", "it"), ""),
    **dict.fromkeys(
        ("hfill", "noindent", "hline", "/", "nonumber", "normalsize", "large", "Large", "LARGE", "huge"), ""
    ),
}
_CHARACTERS = {
    **dict.fromkeys("−﹣－‑‐", "-"),
    **dict.fromkeys("⋅∙•∗", "·"),
    **dict.fromkeys("⩽≦", "≤"),
    **dict.fromkeys("⩾≧", "≥"),
    **dict.fromkeys("≃≅", "≈"),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("‘’′`", "'"),
    **dict.fromkeys("“”″", '"'),
    **{
        "∼": "~",
        "∣": "|",
        "٫": ".",
        "٬": ",",
        "º": "°",
        "˚": "°",
        "√": "√",
        "µ": "μ",
        "，": ",",
        "：": ":",
        "；": ";",
        "％": "%",
        "。": ".",
    },
    **{
        "（": "(",
        "）": ")",
        "＋": "+",
        "＝": "=",
        "＜": "<",
        "＞": ">",
        "／": "/",
        "＄": "\ue000",
        "℃": "°C",
        "℉": "°F",
    },
    **{"θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "φ": r"\phi "},
}
_RAISED = {**dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))}
_LOWERED = {**dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))}
_REWRITTEN = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"\\(?:hspace|vspace|phantom|label|tag|color|textcolor)\*?\{[^{}]*\}", " "),
        (r"\^\s*\{?\s*\\(?:text|mathrm)\s*\{\s*(?:st|nd|rd|th)\s*\}\s*\}?", ""),
        (r"\{\s*([^{}\\]+?)\s*\\choose\s*([^{}\\]+?)\s*\}", r"\\binom{\1}{\2}"),
        (r"\{\s*([^{}\\]+?)\s*\\over\s*([^{}\\]+?)\s*\}", r"\\frac{\1}{\2}"),
        (r"^([^{}\\]+?)\s*\\over\s*([^{}\\]+)$", r"\\frac{\1}{\2}"),
        (r"\\\\\[-?[\d.]+\s*[a-z]{2}\]", r"\\\\"),  # a distance between rows
        (r"(?<![\w}])\(([0-9A-Z]+)\)\s*_", r"\1_"),  # (1011)_2
        (
            r"\(?\s*(?:\\(?:text|mathrm)\s*\{\s*mod\s*\}|(?:\\p?|\b)mod\b)(?:\\[ ,;]|\s)*\{?\s*(\w+)\s*\}?\s*\)?",
            r" mod \1",
        ),
        (r"\\begin\s*\{array\}\s*\{[^{}]*\}", r"\\begin{matrix}"),
        (r"\\end\s*\{array\}", r"\\end{matrix}"),
    )
]
_COMMAND = re.compile(r"\\\\|\\([A-Za-z]+|.)", re.DOTALL)
_PAIRS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'))
CURRENCY = "\ue000"  # a dollar sign that means money: one left over when those of mathematics are gone


def canonical(text: str) -> str:
    """Return `text` in the one spelling that answers are compared in; single spaces separate what spaces separated."""
    text = plain_characters(_strip_pairs(text.strip()))
    text = re.sub(r"(?<=[\w)}\]])\*\*(?=[\w({\-])", "^", text)  # a power in a programming language's spelling
    text = re.sub(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)", "×", text)
    text = re.sub(r"(?<=\d)\{([,:.])\}(?=\d)", r"\1", text)  # braces keep TeX from setting a space
    text = re.sub(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))", "°", text)
    for pattern, spelling in _REWRITTEN:
        text = pattern.sub(spelling, text)
    text = _COMMAND.sub(_sign, text)
    text = re.sub(rf"\\text\s*\{{\s*([{CURRENCY}%°:])\s*\}}", r"\1", text)
    dollars = text.count("$")
    text = text.replace("$", "" if dollars % 2 == 0 else CURRENCY).replace("~", " ").replace("**", "")
    text = text.replace("<=", "≤").replace(">=", "≥").replace("=<", "≤").replace("...", "…").replace("+-", "±")
    text = re.sub(r"(?<=[)\]])\s*U\s*(?=[(\[])", "∪", text)
    text = re.sub(r"(?<![\d.])(\d*\.\d{0,20}?)(\d{1,6}?)\2{2,20}…", r"\1\\overline{\2}", text)  # 0.333…
    text = text.replace("\\cr", "\\\\")
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<!\.)[.,;:?]$", "", text).strip()


def _strip_pairs(text: str) -> str:
    """Take off delimiters of mathematics, bold and quotation that enclose the whole text."""
    changed = True
    while changed:
        changed = False
        for left, right in _PAIRS:
            inner = text[len(left) : len(text) - len(right)]
            whole = len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right)
            if whole and left not in inner and right not in inner and not inner.endswith("\\"):
                text, changed = inner.strip(), True
        bare = text.rstrip(".")
        if len(bare) == len(text) - 1 and bare.endswith(("$", "\\)", "\\]", "**", "`", '"')):
            text, changed = bare, True
    return text


def plain_characters(text: str) -> str:
    """Return the text with the signs that Unicode has several of (minus, digits, fractions, spaces) in one spelling."""
    if text.isascii():
        return text
    text = re.sub(r"(?<![^\s(=$])[–—](?=\s?[\d.$\\])", "-", text)  # a dash between two numbers is a range
    return "".join(_character(piece) for piece in re.findall("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+|[₀₁₂₃₄₅₆₇₈₉]+|.", text, re.DOTALL))


def _character(piece: str) -> str:
    if piece[0] in _RAISED:
        return "^{" + "".join(_RAISED[c] for c in piece) + "}"
    if piece[0] in _LOWERED:
        return "_{" + "".join(_LOWERED[c] for c in piece) + "}"
    if piece in _CHARACTERS:
        return _CHARACTERS[piece]
    category = unicodedata.category(piece)
    if category == "Nd":
        return str(unicodedata.decimal(piece))
    if category in ("Zs", "Zl", "Zp"):
        return " "
    if category in ("Cf", "Mn"):  # joiners, direction marks
        return "" if category == "Cf" else piece
    if category == "No":
        parts = unicodedata.normalize("NFKC", piece).split("⁄")
        if len(parts) == 2:
            return f"\\frac{{{parts[0]}}}{{{parts[1]}}}"
    if "\uff01" <= piece <= "\uff5e" or "\U0001d400" <= piece <= "\U0001d7ff":  # full-width and mathematical letters
        return unicodedata.normalize("NFKC", piece)
    return piece


def _sign(match: re.Match) -> str:
    name = match[1]
    if name is None:
        return "\\\\"
    if name.isspace():
        return " "
    return _SIGNS.get(name, f"\\{name}")
