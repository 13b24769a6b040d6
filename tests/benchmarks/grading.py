"""Answers graded per second, in one process and its worker: plain numbers, numbers in prose, and algebra.

OMP_NUM_THREADS=1 python tests/benchmarks/grading.py
"""

import time

from megatron_tropd.grading.grader import Grader

PROSE = "Natalia sold 48/2 = 24 clips in May, so that $x = 24$ and she sold 48 + 24 clips in all. " * 40


def rate(grader: Grader, pairs: list[tuple[str, str]]) -> float:
    """Return answers per second; every answer must be right, or the figure is of something else."""
    start = time.perf_counter()
    right = sum(grader.grade(response, answer)[1] for response, answer in pairs)
    seconds = time.perf_counter() - start
    assert right == len(pairs), f"{len(pairs) - right} of {len(pairs)} are wrong"
    return len(pairs) / seconds


def main() -> None:
    """Print one line per kind of answer."""
    kinds = {
        "boxed integers": [(PROSE + rf"\boxed{{{i}}}", str(i)) for i in range(5000)],
        "boxed fractions": [(PROSE + rf"\boxed{{\frac{{{i}}}{{{i + 1}}}}}", f"{i}/{i + 1}") for i in range(5000)],
        "#### with a solution as the known answer": [
            (f"{PROSE}\n#### {i:,}", f"{PROSE}\n#### {i}") for i in range(5000)
        ],
        "last number": [(f"{PROSE} So the total is {i}.", str(i)) for i in range(5000)],
        "polynomials": [(rf"\boxed{{(x+{i})^2}}", f"x^2+{2 * i}x+{i * i}") for i in range(500)],
        "roots": [(rf"\boxed{{\frac{{\sqrt{{{i}}}}}{{{i}}}}}", rf"\frac{{1}}{{\sqrt{{{i}}}}}") for i in range(2, 502)],
        "sums by math-verify": [(rf"\boxed{{\sum_{{k=1}}^{{{i}}} k}}", str(i * (i + 1) // 2)) for i in range(2, 102)],
    }
    with Grader() as grader:
        grader.grade(r"\boxed{x+1}", "1+x")  # starts the worker
        for kind, pairs in kinds.items():
            print(f"{kind:<42}{rate(grader, pairs):>9.0f} answers per second", flush=True)


if __name__ == "__main__":
    main()
