r"""The worker process for the algebra of grading: reads a JSON request per line, writes a JSON reply per line.

Algebra, foreign libraries and users' regular expressions can run without end or use all memory, so they run here, under
limits that the system enforces: a request that exceeds its CPU seconds ends the process, and grading/client.py starts
another. Neither torch nor Megatron is imported. It ends with its parent.

    python -m megatron_tropd.grading.worker  # then a line such as {"kind": "value", "left": "x+1", "right": "1+x"}
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import logging
import re
import resource
import signal
import sys
from typing import Any

from megatron_tropd.grading.algebra import same_relation, same_value
from megatron_tropd.grading.expressions import UnreadError, UnsureError

MEMORY = 2 * 1024**3  # bytes of address space
_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
_LATEX = str.maketrans(
    {
        **{"×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ", "±": r"\pm ", "√": r"\sqrt "},
        **{"≤": r"\leq ", "≥": r"\geq ", "≠": r"\neq ", "…": r"\ldots ", "∪": r"\cup ", "∈": r"\in ", "→": r"\to "},
    }
)


def answer(request: dict[str, Any]) -> Any:
    """Return true, false or null for a comparison, the matched text or null for a regular expression."""
    if request["kind"] == "pattern":
        return last_match(request["pattern"], request["text"])
    left, right = request["left"], request["right"]
    try:
        if request["kind"] == "value":
            return same_value(left, right)
        return same_relation(left, right, ordered=request["kind"] == "inequality")
    except UnreadError:  # sums, integrals, limits and the like
        return math_verify(left, right) if request["kind"] == "value" else None
    except UnsureError:
        return None


def last_match(pattern: str, text: str) -> str | None:
    """Return the last match's first group, or the whole match where the pattern has no group."""
    match = None
    for match in re.finditer(pattern, text):  # noqa: B007  (the last one counts)
        pass
    return None if match is None else match[1 if match.re.groups else 0]


def math_verify(left: str, right: str) -> bool | None:
    """Ask math-verify about two expressions in LaTeX commands; None where it is not installed or may guess.

    It removes words and takes letters for units, and it rounds decimals, so it sees neither.
    """
    texts = [text.translate(_LATEX) for text in (left, right)]
    commands = [re.sub(r"\\[A-Za-z]+", " ", text) for text in texts]
    if not any("\\" in text for text in texts) or any(
        re.search(r"\\text|[A-Za-z]{3,}|\d\.\d|\d\s*_", c) for c in commands
    ):
        return None
    if any(
        re.search(r":|\\[lc]?dots|\\text|\\int(?!\s*(?:_|\\limits))", text) for text in texts
    ):  # ratios, more to come, words, constants of integration
        return None
    if importlib.util.find_spec("math_verify") is None:
        return None
    from math_verify import LatexExtractionConfig, parse, verify
    from math_verify.parser import NormalizationConfig

    dressing = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    config = (LatexExtractionConfig(normalization_config=dressing),)
    parsed = [parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None) for text in texts]
    if not all(parsed):
        return None
    return bool(verify(parsed[0], parsed[1], float_rounding=15, numeric_precision=30, timeout_seconds=None))


def _limit_process() -> None:
    """Bound the memory, end with the parent, and leave the terminal's interrupt to it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, even inside of foreign code


def serve() -> None:
    """Answer requests until the parent closes the pipe."""
    _limit_process()
    logging.disable(logging.CRITICAL)
    replies, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no reply
    import mpmath  # noqa: F401  (its import is not part of the first request's time)

    if importlib.util.find_spec("math_verify"):
        import math_verify  # noqa: F401
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["limit"])
        try:
            reply = answer(request)
        except (Exception, RecursionError, MemoryError):
            reply = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve()
