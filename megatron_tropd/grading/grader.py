r"""Grades responses: finds the answer and compares it with the known one, according to `evaluation.grader`.

- math (and auto): grading/answers.py finds it, grading/comparison.py compares it; algebra runs in a worker process.
- multiple_choice: the letter in a box, after "answer is", or the last single letter.
- exact: the same text, ignoring LaTeX's text commands, case, spaces, quotation marks and a final full stop.

    with Grader("math", "auto", seconds=5.0) as grader:
        grader.grade(r"So \boxed{x+1}.", "1+x")  # ("x+1", True)
"""

from __future__ import annotations

import re
import unicodedata

from megatron_tropd.errors import UserError
from megatron_tropd.grading.answers import final_part, find_answer, known_answer, last_boxed, stated_answer
from megatron_tropd.grading.client import GradingWorker
from megatron_tropd.grading.comparison import same_answer

SECONDS = 5.0  # CPU seconds of one comparison where no recipe says otherwise
_LETTER = r"\W{0,20}?(?:(?:option|choice)\s+)?(?:\\text\w*\s*\{\s*)?\(?\s*([A-Za-z])\b\s*[).:}]?"
_CHOSEN = re.compile(
    rf"\b(?:answer|option|choice)\b[^.\n:]{{0,60}}?(?:\bis\b|:|=){_LETTER}(?=[\s*$.,;:)}}]|$)", re.IGNORECASE
)
_CORRECT = re.compile(  # C is correct
    r"(?<![\w'])([A-J])\)?\s+(?:is|must be)\s+(?:the\s+)?(?:(?:only|best)\s+)?(?:correct|right|answer|option|choice)\b"
)
_BOTH = r"\W{0,9}(?:\b(?:or|and)\b|[&/,])\W{0,9}"
_ANOTHER = re.compile(rf"{_BOTH}\(?[A-J]\)?(?=\s*[.,\n]|\W*$)")
_ONE_BEFORE = re.compile(rf"(?<![\w'])[A-J]{_BOTH}$")
_ALONE = re.compile(r"\(([A-Ja-j])\)|(?<![\w'])([A-J])(?=\s*[).:]|\W*$)", re.MULTILINE)
_TAIL = 20_000  # characters from the end in which a letter is looked for


class Grader:
    """Grades responses one by one; a context manager, as it may run a process."""

    def __init__(self, grader: str = "auto", pattern: str = "auto", seconds: float = SECONDS):
        check_pattern(pattern)
        self._grader = "math" if grader == "auto" else grader
        self._pattern = pattern
        self._worker = GradingWorker(seconds)

    @property
    def exceeded(self) -> int:
        """Number of questions that ran past the limit of time or memory; their answers count as wrong."""
        return self._worker.exceeded

    def grade(self, response: str, answer: str) -> tuple[str | None, bool]:
        """Return the answer that was found in the response, or None, and whether it is right."""
        found = self.find(response)
        return found, found is not None and self.same(found, answer)

    def find(self, response: str) -> str | None:
        """Return the response's final answer, or None if there is none."""
        if self._pattern != "auto":
            found = self._worker.last_match(self._pattern, response)
            return None if found is None else found.strip()
        if self._grader == "multiple_choice":
            return find_letter(final_part(response)) or find_letter(response)
        return find_text(final_part(response)) if self._grader == "exact" else find_answer(response)

    def same(self, found: str, answer: str) -> bool:
        """Whether an answer that was found is the known one."""
        if self._grader == "exact":
            return plain_text(found) == plain_text(known_answer(answer))
        if self._grader == "multiple_choice":
            return (find_letter(found) or found.strip().upper()) == known_letter(answer)
        return same_answer(found, known_answer(answer), self._worker.ask)

    def check_answer(self, answer: str, where: str) -> None:
        """Raise UserError if the known answer of the problem at `where` can never be met."""
        if not known_answer(answer):
            raise UserError(f"{where}: answer={answer!r} is empty; give the problem's answer or remove the problem.")
        if self._grader == "multiple_choice" and known_letter(answer) is None:
            raise UserError(
                f"{where}: answer={answer!r} is no letter, which evaluation.grader=multiple_choice compares; write the "
                "right option's letter, such as B, or set evaluation.grader=math or exact."
            )

    def close(self) -> None:
        """End the worker process, if one runs."""
        self._worker.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_pattern(pattern: str) -> None:
    """Raise UserError if `evaluation.answer_pattern` does not compile."""
    try:
        re.compile("" if pattern == "auto" else pattern)
    except re.error as error:
        raise UserError(
            f"evaluation.answer_pattern={pattern!r} is not a regular expression ({error}); correct it, or use auto."
        ) from error


def find_letter(response: str) -> str | None:
    """Return the letter of the option that a response chooses, in upper case, or None."""
    boxed = last_boxed(response)
    if boxed is not None:
        return known_letter(boxed)
    tail = response[-_TAIL:]
    alone = re.fullmatch(r"\W*([A-Ja-j])\W*", tail[-50:])
    if alone and len(tail) <= 50:
        return alone[1].upper()
    chosen = None
    for match in _CHOSEN.finditer(tail):
        letter = match[1]
        if _ANOTHER.match(tail, match.end(1)):  # two letters are no choice
            chosen = None
        elif letter.isupper() or re.search(
            rf"\({letter}\)|{letter}\)?\W*$", match[0] + tail[match.end() :][:3].split("\n")[0]
        ):
            chosen = letter.upper()
    if chosen:
        return chosen
    last = None
    for last in _CORRECT.finditer(tail):  # noqa: B007  (the last one counts)
        pass
    if last:
        return last[1]
    for last in _ALONE.finditer(tail):  # noqa: B007  (the last one counts)
        pass
    if last is None or _ONE_BEFORE.search(tail, max(0, last.start() - 20), last.start()):
        return None
    return (last[1] or last[2]).upper()


def known_letter(answer: str) -> str | None:
    r"""Return the letter of an answer such as B, (b), B. 12 or \textbf{(B)}, in upper case; None if it has none."""
    match = re.match(
        r"[\s$]*(?:\\(?:text\w*|math\w+|mbox)\s*\{\s*)?(?:option |choice )?\(?\s*([A-Za-z])\s*(?:[).:}]|$)",
        known_answer(answer),
        re.IGNORECASE,
    )
    return match[1].upper() if match else None


def find_text(response: str) -> str | None:
    """Return a box's content, what follows `####` or "answer is", else the last line that is not empty."""
    found = last_boxed(response)
    if found is None and "####" in response:
        found = response.rsplit("####", 1)[-1].strip().partition("\n")[0]
    if found is None:
        found = stated_answer(response[-_TAIL:])
    if found is None:
        found = response.strip().rpartition("\n")[2]
    return found.strip() or None


def plain_text(text: str) -> str:
    """Return a text without what `exact` ignores: text commands, case, spaces, quotation marks, last full stop."""
    text = re.sub(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().strip("\"'`*$ ").rstrip(".")
    return text.strip().casefold()
