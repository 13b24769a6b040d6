"""The tests' own helpers: ranks begin with what is preloaded; those that hang, die or raise are named."""

import os
import signal
import sys
import threading

import pytest
from support.helpers import PATIENCE, PRELOAD, run_distributed


def missing_rank():
    return [name for name in PRELOAD if name not in sys.modules]


def test_ranks_begin_with_everything_preloaded():
    """The fork server skips what it cannot import, and every rank would then try again."""
    assert run_distributed(missing_rank, 1) == [[]]


def misbehaving_rank(deed):
    if deed == "hang":
        threading.Event().wait()
    if os.environ["RANK"] == "1":
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no such deed")
    return "fine"


@pytest.mark.parametrize(
    ("deed", "error", "message"),
    [
        ("hang", TimeoutError, r"ranks \[0, 1\] still ran after 0.5 s"),
        ("die", RuntimeError, "rank 1 died with exit code -9"),
        ("raise", RuntimeError, "rank 1 failed:(.|\n)*ValueError: no such deed"),
    ],
)
def test_a_rank_that_hangs_dies_or_raises_is_named(deed, error, message):
    timeout = 0.5 if deed == "hang" else PATIENCE
    with pytest.raises(error, match=message):
        run_distributed(misbehaving_rank, 2, deed, timeout=timeout)
