"""Records are whole JSON lines, survive a kill, and are continued exactly on resume."""

import json
import math

import torch

from megatron_tropd.guidance import load_responses
from megatron_tropd.metrics import MetricsWriter, read_records


def test_records_tensors_and_not_a_number(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(0, {"loss": torch.tensor(1.5), "grad_norm": math.nan, "max": math.inf, "tokens": 7})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 0, "loss": 1.5, "grad_norm": None, "max": None, "tokens": 7}
    assert "NaN" not in text


def test_lines_are_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(0, {"loss": 1.0})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    writer.close()


def test_resume_drops_what_runs_again_and_a_broken_line(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write_evaluation({"step": 0, "accuracy": 0.1})
        for step in range(5):
            writer.write(step, {"loss": float(step)})
            writer.write_samples(step, [{"sample_id": step, "tokens": [{"rho": math.nan}]}])
            writer.write_answers([{"step": step, "id": "a"}, {"step": step, "id": "b"}])
        writer.write_evaluation({"step": 3, "accuracy": 0.2})
        writer.write_evaluation({"step": 5, "accuracy": 0.3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with MetricsWriter(tmp_path, tensorboard=False, start=3) as writer:
        writer.write(3, {"loss": 30.0})
    steps = [(r["step"], r["loss"]) for r in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert [r["step"] for r in read_records(tmp_path / "samples.jsonl")] == [0, 1, 2]
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [0, 3]
    assert [r["step"] for r in read_records(tmp_path / "answers.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    with MetricsWriter(tmp_path, tensorboard=False):
        assert read_records(tmp_path / "evaluations.jsonl") == []


def test_only_the_writer_rank_writes(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(0, {"loss": 1.0})
        writer.write_samples(0, [{}])
        writer.write_evaluation({"step": 0})
        writer.write_answers([{"step": 0}])
    assert not (tmp_path / "run").exists()


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path) as writer:
        for step in range(3):
            writer.write(step, {"loss": float(step) / 2})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_progress_goes_to_standard_error_without_a_terminal(tmp_path, capsys):
    with MetricsWriter(tmp_path, tensorboard=False, total=2) as writer:
        writer.write(0, {"loss": 0.5, "trust_fraction": 0.25})
        writer.write(1, {"loss": 0.4, "trust_fraction": None})
    assert capsys.readouterr().err.splitlines() == ["step 1/2: loss 0.5, trust 0.25", "step 2/2: loss 0.4"]


def test_only_newlines_end_a_record(tmp_path):
    """U+2028 and U+0085 in a response are text, though str.splitlines ends lines at them."""
    records = [{"id": str(i), "teacher_response": "one\u2028two\x85three"} for i in range(3)]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    assert read_records(file) == records
    assert load_responses(file) == {r["id"]: r["teacher_response"] for r in records}
