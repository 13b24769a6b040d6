"""Answers are graded as a mathematician would, by a process that limits bound; wrong answers are never accepted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.grading_pairs import FIELD, OWN

from megatron_tropd.errors import UserError
from megatron_tropd.grading import worker as grading_worker
from megatron_tropd.grading.answers import find_answer, known_answer
from megatron_tropd.grading.comparison import same_answer
from megatron_tropd.grading.grader import Grader


@pytest.fixture(scope="module")
def grader():
    with Grader() as opened:
        yield opened


def _wrong(pairs, grade):
    """The pairs that were graded otherwise than they are labelled."""
    return [(response, answer, right) for response, answer, right in pairs if grade(response, answer) != bool(right)]


def test_field_cases_a11_answers_are_graded_as_labelled(grader):
    assert len(FIELD) == 54
    assert _wrong([case[1:] for case in FIELD], lambda *pair: grader.grade(*pair)[1]) == []


@pytest.mark.parametrize("kind", OWN)
def test_field_cases_a11_relatives(grader, kind):
    pytest.importorskip("math_verify")
    assert _wrong(OWN[kind], lambda *pair: grader.grade(*pair)[1]) == []


def test_field_cases_a11_without_math_verify_nothing_wrong_is_accepted(monkeypatch):
    """Only what is marked as the library's is lost without it."""
    monkeypatch.setattr(grading_worker, "math_verify", lambda left, right: None)

    def grade(response, answer):
        found = find_answer(response)
        ask = lambda kind, left, right: grading_worker.answer({"kind": kind, "left": left, "right": right})  # noqa: E731
        return found is not None and same_answer(found, known_answer(answer), ask)

    pairs = [case[1:] for case in FIELD] + [pair for pairs in OWN.values() for pair in pairs]
    assert len(pairs) > 600
    assert {right for *_, right in _wrong(pairs, grade)} <= {"math-verify"}


def test_being_the_same_has_no_direction(grader):
    pairs = [case[1:] for case in FIELD] + [pair for pairs in OWN.values() for pair in pairs]
    found = [(find_answer(response), known_answer(answer)) for response, answer, _ in pairs]
    one_way = [pair for pair in found if pair[0] and grader.same(*pair) != grader.same(*pair[::-1])]
    assert one_way == []


def test_forms_alone_accept_nothing_wrong():
    """Where the worker says nothing at all, only recall is lost."""
    pairs = [case[1:] for case in FIELD] + [pair for pairs in OWN.values() for pair in pairs]
    found = [(find_answer(response), known_answer(answer), right) for response, answer, right in pairs]
    wrong = [pair for pair in found if pair[0] is not None and same_answer(*pair[:2]) and not pair[2]]
    assert wrong == []


def test_field_cases_b1_long_numbers_are_compared(grader):
    def is_correct(response, answer):
        return grader.grade(response, answer)[1]

    assert not is_correct("1" * 5000, "1")
    assert is_correct("1" * 5000, "1" * 5000)
    assert not is_correct("1" * 5000, "1" * 4999 + "2")
    assert not is_correct(r"\boxed{" + "9" * 5000 + "}", "1e5000")
    assert not is_correct("0." + "3" * 5000, "1/3")
    assert not is_correct("1e999999999", "1")
    assert not is_correct(r"\boxed{1/" + "7" * 5000 + "}", "1")


SIZE = 2**18  # characters
_LONG = [
    *(
        r"\boxed{",
        r"\boxed ",
        "\\boxed{1}, ",
        "{",
        "}",
        "\\",
        "(",
        " ",
        "\n",
        "1",
        "1 ",
        "1,",
        "1/1",
        "1.",
        "-",
        "1:1 ",
    ),
    *("$", "#", "#### a\n", "answer ", "answer is ", "the answer is a ", "**", "1 and ", r"\frac{", "^2", "=", "x=1,"),
    *(
        r"\text{",
        r"\text{ a}",
        r"\begin{cases}",
        r"\pmod ",
        "a ",
        "x**",
        "0.33",
        "½",
        "−",
        "1e",
        "1 million ",
        "(A) ",
        "A. ",
        "option is ",
        "A or ",
        "A is ",
        "</think>",
        "<answer>",
        "1 1/",
        "√",
        "±",
        "!",
    ),
]


@pytest.mark.parametrize("grader_name", ["math", "multiple_choice", "exact"])
def test_field_cases_b2_long_responses_take_linear_time(grader_name):
    """Quadratic code would need hours for all of these, and pytest's limit would end it."""
    with Grader(grader_name) as grader:
        for piece in _LONG:
            text = piece * (SIZE // len(piece))
            assert not grader.grade(text, "B")[1] or grader_name != "math"
            grader.grade(r"\boxed{" + text + "}", "B")
            grader.grade("The answer is " + text, "B")
            grader.grade("7 " + text[: SIZE // 4] + " 7", text[: SIZE // 4])


@pytest.mark.parametrize("piece", _LONG)
def test_answers_of_any_length_are_compared_at_once(piece):
    for length in (500, 3999, 4001):
        text = (piece * length)[:length]
        same_answer(text, "7")
        same_answer("7", text)
        same_answer(text, text[:-1] + "7")


@given(st.text(alphabet="12.,/-+^_{}()[]$%\\ =<>xyπ√±−½|!&;:\n°∪", max_size=40) | st.text(max_size=30))
def test_no_text_breaks_the_grader(text):
    """And an answer is the same as itself, with or without dollars."""
    found = find_answer(text)
    assert found is None or isinstance(found, str)
    find_answer(r"\boxed{" + text + "}")
    same_answer(text, "7")
    same_answer("7", text)
    assert not text.strip() or same_answer(text, text)


@given(
    st.lists(
        st.sampled_from([r"\frac", r"\sqrt", "{", "}", "1", "2", "x", "^", "+", "-", "(", ")", r"\sin", "!", "/", " "])
    )
)
def test_no_expression_breaks_the_algebra(pieces):
    text = "".join(pieces)
    for kind in ("value", "equation", "inequality"):
        request = {"kind": kind, "left": text, "right": "x+1"}
        assert grading_worker.answer(request) in (True, False, None)


HOSTILE = [
    *(r"9^{9^{9^{9}}}", r"10^{10^{10}}", r"(10^9)!", "((3!)!)!", r"x^{10^{10}}", "9^9^9^9", r"2^{2^{2^{2^{2^{2}}}}}"),
    *(r"\frac{1}{" * 300 + "x" + "}" * 300, r"\sqrt{" * 500 + "x" + "}" * 500, "(" * 900 + "x" + ")" * 900),
    *(
        r"\sum_{k=1}^{10^9} k^{k}",
        r"\sum_{n=1}^{3} 9^{9^{9^9}}",
        r"\prod_{k=1}^{10^{9}} k",
        r"\int_0^{10^9} x^{x^{x}} dx",
    ),
    *(
        r"\binom{10^9}{10^8}",
        r"\sin(10^{10^{9}})",
        "1" + "+x" * 900,
        "(x+y+z)^{5000}",
        r"\log_{1} x",
        "0^{0}",
        r"x^{x^{x^{x}}}",
    ),
]


@pytest.fixture(scope="module")
def hasty():
    with Grader(seconds=0.5) as opened:
        yield opened


@pytest.mark.parametrize("expression", HOSTILE)
def test_what_would_never_end_is_wrong_and_ends(hasty, expression):
    assert hasty.grade(rf"\boxed{{{expression}}}", "5y")[1] is False
    assert hasty.grade(r"\boxed{x+1}", "1+x")[1] is True  # by a new process where the old one had to end


def test_a_comparison_over_the_limit_is_counted_and_asked_once():
    pytest.importorskip("math_verify")
    with Grader(seconds=0.3) as grader:
        for _ in range(3):
            assert not grader.grade(r"\boxed{\sum_{k=1}^{10^9} k^{k}}", "5")[1]
        assert grader.exceeded == 1


def test_a_pattern_that_never_ends_finds_nothing():
    with Grader(pattern=r"(a+)+$", seconds=0.3) as grader:
        assert grader.grade("a" * 60 + "b", "a") == (None, False)
        assert grader.exceeded == 1
        assert grader.grade("xaa", "aa") == ("aa", True)


def _pid(grader):
    grader.grade(r"\boxed{x+1}", "1+x")
    return grader._worker._process.pid


def _ended(pid):
    for _ in range(600):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # its parent is gone, and nobody waits for it in this container
            return True
        time.sleep(0.1)
    return False


def test_the_process_ends_with_the_grader():
    with Grader() as grader:
        pid = _pid(grader)
    assert _ended(pid)


def test_the_process_is_bounded_in_memory():
    with Grader() as grader:
        limits = Path(f"/proc/{_pid(grader)}/limits").read_text()
    (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
    assert line.split()[3] == str(grading_worker.MEMORY)


def test_the_process_that_was_killed_is_replaced():
    with Grader() as grader:
        os.kill(_pid(grader), signal.SIGKILL)
        assert grader.grade(r"\boxed{x+2}", "2+x")[1] is False  # the one that was asked is gone
        assert grader.grade(r"\boxed{x+3}", "3+x")[1] is True


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    code = (
        "from megatron_tropd.grading.grader import Grader\n"
        "grader = Grader()\n"
        "grader.grade(r'\\boxed{x+1}', '1+x')\n"
        "print(grader._worker._process.pid, flush=True)\n"
        "import time; time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    pid = int(parent.stdout.readline())
    assert Path(f"/proc/{pid}").exists()
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert _ended(pid)


def test_the_process_starts_in_any_folder_and_imports_no_torch(tmp_path, monkeypatch):
    (tmp_path / "mpmath.py").write_text("raise RuntimeError('the folder of the user was imported')\n")
    monkeypatch.chdir(tmp_path)
    with Grader() as grader:
        assert grader.grade(r"\boxed{x+1}", "1+x")[1]
    code = "import sys, megatron_tropd.grading.worker as w; import mpmath; w.math_verify('\\\\sum_{k=1}^{3} k', '6');"
    code += "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_forked_child_asks_a_process_of_its_own():
    with Grader() as grader:
        pid = _pid(grader)
        child = os.fork()
        if child == 0:
            own = grader.grade(r"\boxed{x+5}", "5+x")[1] and grader._worker._process.pid != pid
            grader.close()
            os._exit(0 if own else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert grader.grade(r"\boxed{x+6}", "6+x")[1]
        assert grader._worker._process.pid == pid


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"\boxed{B}", "B"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\textbf{(D) }12}", "D"),
        (r"\boxed{b}", "B"),
        (r"\boxed{12}", None),
        ("The answer is B.", "B"),
        ("The answer is (b).", "B"),
        ("The correct option is: **C**", "C"),
        ("Answer: D", "D"),
        ("Answer: (D) because A is too small.", "D"),
        ("The answer is a dog, hence (B)", "B"),
        ("A is wrong. B is right.\n\nB", "B"),
        ("A. 3\nB. 4\nSo 4, which is B.", "B"),
        ("(A) is too small, (B) fits", "B"),
        ("Option B is correct because option A is too small.", "B"),
        ("B is the correct answer.", "B"),
        ("Hence (B) is correct, (D) is not.", "B"),
        ("b", "B"),
        ("**B**", "B"),
        ("<think>\\boxed{A}</think>The answer is B", "B"),
        ("<think>The answer is A.</think>B", "B"),
        ("<answer>B</answer>", "B"),
        ("The answer is A or B.", None),
        ("The answer is B and A is wrong.", "B"),
        ("Both A and B", None),
        (r"\boxed{A, B}", None),
        ("I think that it is so", None),
        ("It is a fact", None),
        ("", None),
    ],
)
def test_multiple_choice_finds_the_letter(response, letter):
    with Grader("multiple_choice") as grader:
        assert grader.find(response) == letter
        for answer in ("B", "(b)", r"\textbf{(B)}", "B. 12"):
            assert grader.grade(response, answer)[1] == (letter == "B")


def test_multiple_choice_refuses_answers_without_a_letter():
    with Grader("multiple_choice") as grader:
        grader.check_answer("(C)", "p.jsonl:1")
        with pytest.raises(UserError, match=r"p.jsonl:2: answer='2' is no letter.*evaluation.grader=math or exact"):
            grader.check_answer("2", "p.jsonl:2")
    with Grader() as grader, pytest.raises(UserError, match=r"p.jsonl:3: answer=' ' is empty"):
        grader.check_answer(" ", "p.jsonl:3")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("New York", "new  york", True),
        (r"\boxed{New York.}", "New York", True),
        ("I thought.\nThe answer is New York.", "New York", True),
        ("#### New York\n", "new york", True),
        ("It was long.\n\nNew York", "New York", True),
        ('"New York"', "New York", True),
        ("1/2", "0.5", False),
        ("York", "New York", False),
        ("New York City", "New York", False),
        (r"\boxed{\text{New York}}", "New York", True),
        ("<think>\\boxed{London}</think>New York", "New York", True),
        ("<think>London</think><answer>New York</answer>", "New York", True),
        ("ＡＢ", "ab", True),
    ],
)
def test_exact_compares_text(response, answer, right):
    with Grader("exact") as grader:
        assert grader.grade(response, answer)[1] == right


def test_a_pattern_that_does_not_compile_is_refused():
    with pytest.raises(UserError, match=r"evaluation.answer_pattern='\(' is not a regular expression"):
        Grader(pattern="(")
