r"""Finds the final answer in a response, in time linear in the response.

It is the last `\boxed{...}` whose braces balance (several joined by "and", "or" or a comma are one list), else the text
after the last `####`, else the text after the last "answer is", else the last number with all its parts:
`2 3/4`, `6.02 \times 10^{23}`, `2\sqrt{3}`, `5 or 6`.

The search starts after `</think>` and in `<answer>`, then covers the whole response.

    find_answer(r"So \boxed{5}.")  # "5"
"""

from __future__ import annotations

import re

from megatron_tropd.grading.answer_forms import read_answer
from megatron_tropd.grading.answer_text import plain_characters

_TAIL = 20_000  # characters from the end in which "answer is" and the last number are looked for
_LONGEST_TAGGED = 300  # characters in an <answer> that may all be the answer
_BOXES = 200  # box commands from the end that are looked at
_BRACES = re.compile(r"\\{1,3}(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s*(-?\d[\d.,/]*|\\[A-Za-z]+|[A-Za-z])")
_BETWEEN_BOXES = re.compile(r"[\s$,;]*(?:and|or|,|;|\\text\{\s*(?:and|or)\s*\})[\s$,;]*")
_STATED = re.compile(r"\banswer\b[^.\n:=]{0,60}?(?:\b(?:is|are)\b|:|=)[\s*:]*", re.IGNORECASE)
_SENTENCE = re.compile(r"(?:[^\n.]|\.(?!\s|\**\s*$|\$?\s*$))*")
_REASON = re.compile(r",?\s+(?:because|since|which|so|when|where|if|as)\b|,\s+(?:and|but|not)\b", re.IGNORECASE)

_PLAIN = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)*"
_NUMBER = re.compile(
    rf"(?:(?<![\w).])-)?(?:\d+(?::\d+)+(?:\s?[AaPp]\.?[Mm]\b)?|\d+\s\d+/\d+|{_PLAIN}(?:/\d+(?:\.\d+)?)?)"
    r"(?:\s*(?:\\times|\\cdot|[×·*x])\s*10\s*\^\s*(?:\{\s*-?\d+\s*\}|-?\d+)|[eE][+-]?\d+)?"
    r"(?:\s?\\?%|\s+(?:hundred|thousand|million|billion|trillion|dozen|percent)\b)?|(?<![\w.])-?\.\d+"
)
_RUN = re.compile(
    r"(?:\\[A-Za-z]+|\\[{},;!()\[\]]|[\d.,{}^_()\[\]+\-*/=|!<>%°√π×·±∞]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])|[ \t](?=\S))+"
)
_GLUED = re.compile(r"[A-Za-z]+")
_NOT_A_FACTOR = {
    *("th", "st", "nd", "rd", "m", "g", "s", "h", "L", "l", "cm", "mm", "km", "kg", "mg", "ft", "in", "lb", "oz", "ml"),
    *("mL", "yd", "mi", "am", "pm", "AM", "PM", "hr"),
}
_PART_BEFORE = re.compile(  # what makes the number behind it a part of something
    r"[\\^_{√±∓]\s?$|\\[A-Za-z]+\s*[({]?\s*$|[\^_][({]?-?$|(?<![A-Za-z])[b-z]\s*[+-]\s*$|(?:(?<![A-Za-z])[A-Za-z]|\\[A-Za-z]+|[)}π])\s*/\s*$"
)
_PART_AFTER = re.compile(r"\(|\s*(?:\\(?!\)|\]|\\|[,;]?\s*text|\%|\$|n)[A-Za-z(]|[\^_!√π]|[}|])")
_UNIT_BEFORE = re.compile(r"(?:(?<![\\A-Za-z])(?:[A-Za-z]{2,}|(?<=\d )m)|\\(?:text|mathrm)\s*\{[^{}]*\})\s*\^\s*\{?-?$")
_LIST_BEFORE = re.compile(
    rf"(?:[A-Za-z]\s*=\s*)?(?:-?{_PLAIN},\s)*(?:[-\d.,/]*\d)\s*\$?,?\s*\b(?:and|or)\s+\$?(?:[A-Za-z]\s*=\s*)?$|=\s*(?:-?{_PLAIN}\s*,\s*)+$"
)


def find_answer(response: str) -> str | None:
    """Return the response's final answer, or None if there is none."""
    said = final_part(response)
    found = _find(said, tagged=f"<answer>{said}</answer>" in response)
    return _find(response) if found is None and len(said) < len(response) else found


def final_part(response: str) -> str:
    """Return what stands behind the thoughts, which end with `</think>`, and in `<answer>` if there is such a tag."""
    for opening, closing in (("</think>", ""), ("<answer>", "</answer>")):
        part = response.rpartition(opening)[2]
        part = part.partition(closing)[0] if closing else part
        response = part if part.strip() else response
    return response


def _find(response: str, tagged: bool = False) -> str | None:
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    marked = _marked(response)
    if marked is not None or "\\boxed" in response:  # a box that was cut short holds no answer to guess
        return marked
    tail = response[-_TAIL:]
    if tagged and len(tail) < _LONGEST_TAGGED:
        return _of_sentence(tail.strip(), 0)
    return stated_answer(tail) or _last_quantity(tail) or _in_bold(tail)


def known_answer(answer: str) -> str:
    """Return the answer itself of a problem's `answer`, which may be a whole solution with a box or `####`."""
    boxed = last_boxed(answer)
    if boxed is not None:
        return boxed
    return answer.rsplit("####", 1)[-1].strip() if "####" in answer else answer.strip()


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}` or `\fbox{...}` whose braces balance, one pass over the text."""
    text = text[_start_of_last(text, "box", _BOXES) :]
    if "box" not in text:
        return None
    open_braces: list[tuple[bool, int, int]] = []  # is a box, where its command and its content start
    boxes: list[tuple[int, int, int]] = []  # where command and content start and where the content ends
    for match in _BRACES.finditer(text):
        token = match[0]
        if token == "}":
            if open_braces:
                is_box, start, content = open_braces.pop()
                if is_box:
                    boxes.append((start, content, match.start()))
        elif token[-1] == "{" and len(token) != 2:
            open_braces.append((len(token) > 1, match.start(), match.end()))
    bare = None
    for bare in _BARE_BOX.finditer(text):  # noqa: B007  (the last one counts)
        pass
    if bare and not (boxes and max(boxes)[0] > bare.start()):
        return bare[1].strip(".,")
    if boxes:
        return _joined(text, boxes)
    last = next((content for is_box, _, content in reversed(open_braces) if is_box), None)
    unclosed = None if last is None else text[last : last + 50].strip(" $.\n")  # without a brace at its end
    return unclosed if unclosed and _NUMBER.fullmatch(unclosed) else None


def _start_of_last(text: str, word: str, count: int) -> int:
    """Return where the `count`-th last `word` begins, with the backslash before it; 0 if there are fewer."""
    at = len(text)
    for _ in range(count):
        at = text.rfind(word, 0, at)
        if at < 0:
            return 0
    return max(0, at - 10)


def _joined(text: str, boxes: list[tuple[int, int, int]]) -> str:
    """Return the last box's content, with those of boxes before it that are joined to it."""
    boxes.sort(reverse=True)
    start, content, end = boxes[0]
    contents = [text[content:end].strip()]
    for other, content, end in boxes[1:50]:
        if end > start:  # around the one before
            break
        if start - end > 40 or not _BETWEEN_BOXES.fullmatch(text[end + 1 : start]):
            break
        contents.append(text[content:end].strip())
        start = other
    return ", ".join(reversed(contents))


def _marked(text: str) -> str | None:
    """Return what follows the last `####` on its line; headings (words, with text after them) are skipped."""
    end = len(text)
    while True:
        start = text.rfind("####", 0, end)
        if start < 0:
            return None
        line = text[start + 4 :].partition("\n")[0].strip()
        last = not text[start + 4 + len(line) :].strip().strip("#").strip() or text[start:].strip().count("\n") == 0
        if line and (last or not line[0].isalpha()):
            return line
        end = start


def stated_answer(text: str) -> str | None:
    """Return the text after the last "answer is" or "Answer:"."""
    stated = None
    if "answer" not in text.lower():  # most responses end here, and the pattern is slow
        return None
    for stated in _STATED.finditer(text):  # noqa: B007  (the last one counts)
        pass
    if not stated:
        return None
    return _of_sentence(text, stated.end())


def _of_sentence(text: str, start: int) -> str | None:
    """Return the answer that the sentence at `start` says: all of it, or the last quantity of prose."""
    sentence = _SENTENCE.match(text, start)
    assert sentence is not None  # the pattern matches an empty text, too
    said = _REASON.split(sentence[0], maxsplit=1)[0].strip().strip("*` ").strip()
    if not said or len(said) > 300:
        return None
    form = read_answer(said)
    prose = re.search(r"(?<![\\A-Za-z{])[A-Za-z]{4,}", re.sub(r"\\text\w*\{[^{}]*\}", "", form.text))
    if form.kind in ("number", "set", "tuple", "matrix", "relation", "union") or not prose:
        return said
    if form.kind == "words" and len(said.split()) <= 4:
        return said
    if form.kind == "list" and all(part.kind in ("number", "words", "relation", "tuple") for part in form.parts):
        return said
    return _last_quantity(said)


def _in_bold(text: str) -> str | None:
    """Return the bold words that end a response without any number."""
    match = re.search(r"\*\*([^*\n]{1,40})\*\*\W*$", text[-100:])
    return match[1].strip() if match else None


def _last_quantity(text: str) -> str | None:
    """Return the last number with the mathematics that it belongs to."""
    text = plain_characters(text)
    number = _last_number(text)
    if number is None:
        return None
    before, after = text[max(0, number.start() - 300) : number.start()], text[number.end() :][:300]
    span = _span(before, number[0], after)
    if span:
        return span
    glued = _GLUED.match(after)
    in_product = glued is not None and glued[0] not in _NOT_A_FACTOR and len(glued[0]) <= 2
    signed = number[0][0] == "-" and before.endswith("+")
    if in_product or signed or _PART_BEFORE.search(before) or _PART_AFTER.match(after):
        return _run(text, number) or number[0]
    if "." in number[0] and re.match(r"\.\.|…|\\[lc]?dots", after):
        return number[0] + "…"  # the beginning of more digits
    joined = _LIST_BEFORE.search(before)
    return re.sub(r"^=\s*", "", joined[0] + number[0]).replace("$", "") if joined else number[0]


def _span(before: str, number: str, after: str) -> str | None:
    """Return the formula in dollars or LaTeX's parentheses that contains the number, after its last equality sign."""
    line, rest = before.rpartition("\n")[2], after.partition("\n")[0]
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        opened = line.rpartition(opening)[2]
        inside = opening in line and (line.count("$") % 2 == 1 if opening == "$" else closing not in opened)
        if inside and closing in rest:
            formula = (opened + number + rest.partition(closing)[0]).strip().rstrip(".,")
            if _RUN.fullmatch(formula):
                return formula.rsplit("=", 1)[-1].strip() or None
    return None


def _last_number(text: str) -> re.Match | None:
    """Return the last number that is no exponent of a unit, looked for near the end first."""
    for size in (200, 2000, len(text)):
        start = max(0, text.rfind(" ", 0, max(0, len(text) - size)))
        number = None
        for candidate in _NUMBER.finditer(text, start):
            if not _UNIT_BEFORE.search(text, max(0, candidate.start() - 40), candidate.start()):
                number = candidate
        if number and number.start() >= start + 60:  # not cut in its middle
            break
    return number


def _run(text: str, number: re.Match) -> str | None:
    """Return the stretch of mathematics around a number, behind its last equality sign."""
    start = max(0, number.start() - 300)
    for run in _RUN.finditer(text, start, number.end() + 300):
        if run.start() <= number.start() and run.end() >= number.end():
            said = re.sub(r"^\s*[aI]\s", "", run[0]).rsplit("=", 1)[-1]
            said = re.sub(r"\\[\])(\[]", "", said).strip().rstrip(".,").strip()
            return said.strip("()") if said.count("(") != said.count(")") else said
    return None
