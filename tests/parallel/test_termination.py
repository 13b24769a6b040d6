"""Signals as a flag: the first is kept, torchrun's copy of a Ctrl-C is not a second one, the second ends at once."""

import os
import signal

import pytest

from megatron_tropd.parallel import termination
from megatron_tropd.parallel.termination import TerminationFlag


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(termination.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(termination, "any_rank", lambda raised: raised)  # one process
    return now


def _interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "Ctrl-C")])
def test_a_signal_is_kept_and_the_handlers_come_back(number, reason, clock):
    before = signal.getsignal(number)
    with TerminationFlag() as flag:
        assert not flag.agreed()
        os.kill(os.getpid(), number)
        assert flag.agreed()
        assert flag.reason == reason
    assert signal.getsignal(number) is before


def test_the_launchers_copy_counts_as_the_same_ctrl_c_and_a_second_one_ends(clock):
    with TerminationFlag() as flag:
        _interrupt()
        clock[0] += 0.5
        _interrupt()
        assert flag.agreed()
        clock[0] += 3.0
        with pytest.raises(KeyboardInterrupt):
            _interrupt()


def test_a_ctrl_c_after_sigterm_still_waits_for_the_checkpoint(clock):
    with TerminationFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 3.0
        _interrupt()
        assert flag.reason == "SIGTERM"
