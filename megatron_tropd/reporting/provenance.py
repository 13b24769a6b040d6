"""Records each start of a run for its report: models, hardware, versions, commit and time.

The records are in run.json of the run's folder. Each start of a resumed run appends one; a run that begins at step 0
removes the earlier ones.

    record_start(folder, recipe, first_step=0)
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.rounding import ceil_div
from megatron_tropd.system.json_files import write_json
from megatron_tropd.system.launcher import launcher_local_world_size, launcher_world_size

FILE = "run.json"
_PACKAGES = ("megatron-tropd", "megatron-core", "torch", "transformers", "transformer-engine", "flash-attn", "triton")
_GIT_SECONDS = 10.0  # a slow file system must not hold a run up


def record_start(folder: str | Path, recipe: Recipe, first_step: int) -> dict[str, Any]:
    """Add this start to the folder's run.json, and return what it says; to be called by one rank.

    Args:
        folder: the run's.
        recipe: resolved and checked.
        first_step: the step that will run next; above 0 where the run is resumed.
    """
    path = Path(folder) / FILE
    starts = _earlier_starts(path) if first_step else []
    start = describe_start(recipe, first_step)
    write_json(path, {"starts": [*starts, start]})
    return start


def _earlier_starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
    except (OSError, ValueError, KeyError, TypeError):  # what stood there is of use to nobody
        return []
    return starts if isinstance(starts, list) else []


def describe_start(recipe: Recipe, first_step: int) -> dict[str, Any]:
    """Return a start's entry in run.json."""
    processes = launcher_world_size()
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "first_step": first_step,
        "command": sys.argv,
        "processes": processes,
        "nodes": ceil_div(processes, launcher_local_world_size(processes)),
        "device": _device(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": commit(),
        "models": {role: _model(recipe, role) for role in ("student", "teacher")},
    }


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return f"CPU, {os.cpu_count()} cores ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the checkout that runs, with a plus where files differ from it; None outside a checkout."""
    here = Path(__file__)
    # An installation may lie inside an unrelated repository, whose commit is meaningless.
    if _git(here.parent, "ls-files", "--error-unmatch", here.name) is None:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{head}+" if head and changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _model(recipe: Recipe, role: str) -> dict[str, Any] | None:
    from megatron_tropd.models.build import load_hf_config
    from megatron_tropd.models.convert import resolve_hf_path
    from megatron_tropd.planning.sizes import whole_parameters

    model = getattr(recipe, role)
    if not (model.hf_path or model.checkpoint):  # an objective without a teacher
        return None
    hf_path = resolve_hf_path(model, role)
    hf = load_hf_config(hf_path)
    parameters = whole_parameters(hf).total
    return {"path": model.checkpoint or model.hf_path, "type": hf.model_type, "parameters": parameters}
