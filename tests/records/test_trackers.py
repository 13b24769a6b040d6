"""Trackers hold the numbers of metrics.jsonl under the same keys, and a run that continues goes on in the same run."""

import json

import pytest
from support.helpers import run_distributed

from megatron_tropd.errors import UserError
from megatron_tropd.machine.preflight import problems
from megatron_tropd.recipe import load_recipe
from megatron_tropd.records.metrics import MetricsWriter
from megatron_tropd.records.trackers import FILE, missing_packages, open_trackers


def _write(folder, *overrides, first_step=0, steps=3):
    recipe = load_recipe(None, [f"logging.dir={folder}", *overrides])
    folder.mkdir(exist_ok=True)
    trackers = open_trackers(recipe, folder, first_step)
    writer = MetricsWriter(folder, start=first_step, trackers=trackers)
    for step in range(first_step, first_step + steps):
        writer.write(step, {"loss": step / 2, "nothing": None, "rho_histogram": [1, 2]})
    writer.write_evaluation({"step": first_step + steps, "accuracy": 0.25})
    writer.close(finished=first_step > 0)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _write(tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("evaluation/accuracy")] == [(3, 0.25)]
    assert set(events.Tags()["scalars"]) == {"loss", "evaluation/accuracy"}


def test_mlflow_holds_the_same_numbers_and_continues(tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    place = f"file:{tmp_path}/mlflow"
    overrides = [f"logging.mlflow.tracking_uri={place}", "logging.mlflow.experiment=ours", "training.steps=5"]
    _write(tmp_path / "run", *overrides)
    client = mlflow.MlflowClient(place)
    experiment = client.get_experiment_by_name("ours").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "KILLED"
    _write(tmp_path / "run", *overrides, first_step=3, steps=2)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(step, step / 2) for step in range(5)]
    assert run.data.params["training.steps"] == "5"
    assert set(run.data.metrics) == {"loss", "evaluation/accuracy"}
    _write(tmp_path / "run", *overrides)  # from the beginning: another run
    assert len(client.search_runs([experiment])) == 2


def write_wandb_offline(folder):
    """Write a run and its continuation; in a separate process, which wandb's service would outlive otherwise."""
    from pathlib import Path

    overrides = ["logging.wandb.project=ours", "logging.wandb.mode=offline", "training.steps=5"]
    _write(Path(folder), *overrides)
    first = json.loads((Path(folder) / FILE).read_text())
    _write(Path(folder), *overrides, first_step=3, steps=2)
    assert json.loads((Path(folder) / FILE).read_text()) == first
    return first["wandb"]


def test_wandb_holds_the_same_numbers_offline_and_continues(tmp_path):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    (run_id,) = run_distributed(write_wandb_offline, 1, str(tmp_path / "run"))
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))
    assert files
    content = b"".join(file.read_bytes() for file in files)
    for text in (b"evaluation/accuracy", b"loss", b"objective.name", b"ours"):
        assert text in content
    assert b"rho_histogram" not in content


def test_a_tracker_that_refuses_is_named(tmp_path):
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    with pytest.raises(UserError, match=r"logging.mlflow.tracking_uri=nonsense://x: mlflow cannot be used"):
        _write(tmp_path / "run", "logging.mlflow.tracking_uri=nonsense://x")


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(monkeypatch):
    from megatron_tropd.machine.environment import gather
    from megatron_tropd.records import trackers

    environment = gather()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    recipe = load_recipe(None, ["logging.wandb.project=ours", "logging.mlflow.tracking_uri=file:x"])
    first, second = missing_packages(recipe)
    assert "pip install 'megatron-tropd[wandb]'" in first
    assert "logging.mlflow.tracking_uri=file:x" in second
    assert first in problems(recipe, environment)
    assert not list(missing_packages(load_recipe()))
