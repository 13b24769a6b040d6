"""Sends the numbers of metrics.jsonl to TensorBoard, Weights & Biases and MLflow.

trackers = open_trackers(recipe, folder, first_step=0)
for tracker in trackers: tracker.write(step, {"loss": 0.5, "evaluation/accuracy": 0.7})

The keys are those of metrics.jsonl, and evaluation/KEY those of evaluations.jsonl; what is no number (histograms)
stays in the files. A run that continues goes on in the same run of the tracker, whose id trackers.json keeps.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.recipe_changes import settings_of
from megatron_tropd.system.json_files import write_json

FILE = "trackers.json"
_EXTRAS = {"wandb": "project", "mlflow": "tracking_uri"}  # package -> the key that turns it on


class Tracker(Protocol):
    """What a tracker does."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Send the numbers of a step, or of an evaluation after `step` steps."""

    def close(self, finished: bool) -> None:
        """Send what is left; `finished`: whether all planned steps are done."""


def missing_packages(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence per tracker that the recipe names and that is not installed."""
    for package, key in _EXTRAS.items():
        value = getattr(getattr(recipe.logging, package), key)
        if value and importlib.util.find_spec(package) is None:
            yield (
                f"logging.{package}.{key}={value}: the package {package} is not installed; run "
                f"`pip install 'megatron-tropd[{package}]'`, or remove the key."
            )


def open_trackers(recipe: Recipe, folder: Path, first_step: int) -> list[Tracker]:
    """Open the trackers that a recipe names; to be called by the rank that writes.

    Args:
        recipe: its logging.*.
        folder: the run's, which must exist.
        first_step: the step that will run next; 0 begins new runs there, too.

    Raises:
        UserError: a tracker refuses.
    """
    ids = _read_ids(folder) if first_step else {}
    trackers: list[Tracker] = []
    if recipe.logging.tensorboard:
        trackers.append(_TensorBoard(folder, first_step))
    for name, make in (("wandb", _Wandb), ("mlflow", _Mlflow)):
        config, key = getattr(recipe.logging, name), _EXTRAS[name]
        if not getattr(config, key):
            continue
        try:
            tracker = make(recipe, folder, ids.get(name))
        except Exception as error:  # theirs are of many kinds
            reason = " ".join(str(error).split())
            raise UserError(
                f"logging.{name}.{key}={getattr(config, key)}: {name} cannot be used ({reason}); change or remove it."
            ) from error
        ids[name] = tracker.id
        trackers.append(tracker)
    if ids:
        write_json(folder / FILE, ids)
    return trackers


def _read_ids(folder: Path) -> dict[str, str]:
    try:
        ids = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none were used so far
        return {}
    return ids if isinstance(ids, dict) else {}


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, recipe: Recipe, folder: Path, run_id: str | None):
        import wandb

        config = recipe.logging.wandb
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or folder.name,
            mode=config.mode,
            id=run_id,
            resume="allow" if run_id else None,
            dir=str(folder),
            config=settings_of(recipe),
            settings=wandb.Settings(silent=True, console="off"),
        )
        self.id = self._run.id
        # Not wandb's own step, which never goes back: a killed run repeats some.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _Mlflow:
    def __init__(self, recipe: Recipe, folder: Path, run_id: str | None):
        from mlflow import MlflowClient

        config = recipe.logging.mlflow
        # MLflow 3.7 and newer accept a folder, which needs no database, only with this variable.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = MlflowClient(config.tracking_uri)
        self.id = run_id or self._begin(config.experiment, config.name or folder.name, recipe)
        self._client.update_run(self.id, status="RUNNING")

    def _begin(self, experiment: str, name: str, recipe: Recipe) -> str:
        from mlflow.entities import Param

        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id = self._client.create_run(place, run_name=name).info.run_id
        texts = {key: str(value)[:500] for key, value in settings_of(recipe).items()}  # MLflow's limit
        items = [Param(key, text) for key, text in texts.items()]
        for start in range(0, len(items), 100):
            self._client.log_batch(run_id, params=items[start : start + 100])
        return run_id

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[Metric(key, value, now, step) for key, value in numbers.items()])

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")
