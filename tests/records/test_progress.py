"""Progress: the same numbers in the panel and in lines, on standard error; a reader who leaves ends nothing."""

import io
import logging
import os
import sys

import pytest

from megatron_tropd.records.progress import Lines, Panel, Progress, open_progress
from megatron_tropd.records.progress_text import figures, sample_text
from megatron_tropd.system.short_text import duration

RECORD = {
    "loss": 0.51234,
    "trust_fraction": 0.825,
    "mean_rho": 0.9,
    "response_length": 31.2,
    "grad_norm": None,
    "tokens_per_second": 17825.4,
    "seconds_rollout": 0.13,
    "seconds_teacher": 0.02,
    "seconds_update": 0.053,
    "memory_update_gb": 46.26,
}
SAMPLE = {
    "prompt": "user\nHow many?",
    "tokens": [{"text": "4", "kind": "trust"}, {"text": "+", "kind": "outlier"}, {"text": "\n", "kind": "guidance"}],
}


def test_lines_hold_every_number_and_the_time_left(capsys):
    lines = Lines(total=3, interval=0.0)
    lines.evaluation({"step": 0, "accuracy": 0.316})
    lines.step(0, RECORD, [SAMPLE])
    lines.step(2, RECORD)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "evaluation after 0 steps: accuracy 31.6%"
    assert second == (
        "step 1/3: loss 0.5123, trust 82.5%, rho 0.900, length 31.2, tokens/s 17,825, accuracy 31.6%, "
        "seconds rollout 0.13 teacher 0.02 update 0.053, GB update 46.26, 0 s left"
    )
    assert third.startswith("step 3/3: loss 0.5123")
    assert not third.endswith("left")


@pytest.mark.parametrize("mode", ["lines", "panel", "none"])
def test_a_run_is_introduced_whatever_shows_its_progress(mode, capsys):
    open_progress(mode, interval=1.0, total=1, steps_done=0).introduce([("student", "small"), ("teacher", "large")])
    expected = "" if mode == "none" else "student   small\nteacher   large\n"
    assert capsys.readouterr().err == expected


def test_a_line_per_interval_and_always_the_last(capsys):
    lines = Lines(total=5, interval=3600.0)
    for step in range(5):
        lines.step(step, {"loss": 1.0})
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == ["step 1/5", "step 5/5"]


def test_the_panel_shows_the_same_numbers_and_the_last_sample(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        with Panel(total=3) as panel:
            panel.stage("update")
            panel.evaluation({"step": 0, "accuracy": 0.316})
            panel.evaluation({"step": 1, "accuracy": 0.66})
            panel.step(1, RECORD, [SAMPLE])
            logging.getLogger("megatron_tropd").warning("saved somewhere")
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    for name, text in figures(RECORD, [{"accuracy": 0.316}, {"accuracy": 0.66}]):
        assert f"{name} {text}" in shown
    for text in ("31.6% → 66.0%", "2/3", "update", "How many?", "4+⏎", "saved somewhere"):
        assert text in shown
    assert handler.stream is screen  # as it was before


@pytest.mark.parametrize(
    ("mode", "terminal", "kind"),
    [("auto", True, Panel), ("auto", False, Lines), ("lines", True, Lines), ("none", True, Progress)],
)
def test_what_is_shown_where(mode, terminal, kind, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    options = {"interval": 1.0, "total": 2, "steps_done": 0}
    assert type(open_progress(mode, **options)) is kind
    assert type(open_progress(mode, **options, enabled=False)) is Progress


def test_a_reader_who_left_ends_nothing(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    broken = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stderr", broken)
    lines = Lines(total=2, interval=0.0)
    for step in range(2):
        lines.step(step, RECORD)
    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        broken.close()


def test_long_samples_are_cut():
    text = sample_text({"prompt": "p " * 500, "tokens": [{"text": "word ", "kind": "trust"}] * 500}, width=80)
    assert len(text) < 170 + 4 * 80
    assert text.plain.endswith("…")


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (700, "12 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
