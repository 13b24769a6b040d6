"""Records are whole JSON lines, survive a kill, and are continued exactly on resume."""

import json
import math

import torch
from support.helpers import run_distributed

from megatron_tropd.errors import UserError
from megatron_tropd.prompts.responses import Responses
from megatron_tropd.records.metrics import MetricsWriter, read_records


def test_records_tensors_and_not_a_number(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": torch.tensor(1.5), "grad_norm": math.nan, "max": math.inf, "tokens": 7})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 0, "loss": 1.5, "grad_norm": None, "max": None, "tokens": 7}
    assert "NaN" not in text


def test_lines_are_on_disk_before_close(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(0, {"loss": 1.0})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]
    writer.close()


def test_resume_drops_what_runs_again_and_a_broken_line(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write_evaluation({"step": 0, "accuracy": 0.1})
        for step in range(5):
            writer.write(step, {"loss": float(step)})
            writer.write_samples(step, [{"sample_id": step, "tokens": [{"rho": math.nan}]}])
            writer.write_answers([{"step": step, "id": "a"}, {"step": step, "id": "b"}])
        writer.write_evaluation({"step": 3, "accuracy": 0.2})
        writer.write_evaluation({"step": 5, "accuracy": 0.3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with MetricsWriter(tmp_path, start=3) as writer:
        writer.write(3, {"loss": 30.0})
    steps = [(r["step"], r["loss"]) for r in read_records(tmp_path / "metrics.jsonl")]
    assert steps == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]
    assert [r["step"] for r in read_records(tmp_path / "samples.jsonl")] == [0, 1, 2]
    assert [r["step"] for r in read_records(tmp_path / "evaluations.jsonl")] == [0, 3]
    assert [r["step"] for r in read_records(tmp_path / "answers.jsonl")] == [0, 0, 1, 1, 2, 2, 3, 3]
    with MetricsWriter(tmp_path):
        assert read_records(tmp_path / "evaluations.jsonl") == []


def test_only_the_writer_rank_writes(tmp_path):
    with MetricsWriter(tmp_path / "run", enabled=False) as writer:
        writer.write(0, {"loss": 1.0})
        writer.write_samples(0, [{}])
        writer.write_evaluation({"step": 0})
        writer.write_answers([{"step": 0}])
    assert not (tmp_path / "run").exists()


def test_only_newlines_end_a_record(tmp_path):
    """U+2028 and U+0085 in a response are text, though str.splitlines ends lines at them."""
    records = [{"id": str(i), "teacher_response": "one\u2028two\x85three"} for i in range(3)]
    file = tmp_path / "responses.jsonl"
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    assert read_records(file) == records
    responses = Responses(file, key="guidance.responses")
    assert {r["id"]: responses.get(r["id"])[0] for r in records} == {r["id"]: r["teacher_response"] for r in records}


def limit_and_write(folder):
    """Write records until the system refuses; a limit on file sizes stands for a full disk."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    writer = MetricsWriter(folder)
    try:
        for step in range(100):
            writer.write(step, {"loss": 1.0})
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return None


def test_field_cases_b16_a_disk_that_fills_up_under_the_records_is_named(tmp_path):
    (message,) = run_distributed(limit_and_write, 1, str(tmp_path))
    assert f"{tmp_path / 'metrics.jsonl'} cannot be written (" in message
    assert "make room" in message
    steps = [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert steps == list(range(len(steps)))
    assert len(steps) in (38, 39)  # 1000 bytes; the rest of the last line is written where there is room at the end
    writer = MetricsWriter(tmp_path, start=30)
    writer.write(30, {"loss": 2.0})
    writer.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(31))
