"""What every stage runs in: a working folder from which this checkout imports without being installed, and no network.

The package's folders are mapped when it is installed (`kernels/` becomes `megatron_tropd.kernels`); links do the same
for a checkout, in subprocesses and under torchrun alike. Whatever is installed, the stages measure this checkout.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
_MAPPED = {"kernels": "kernels", "recipes": "examples/recipes"}  # see setup.py
_PROBE = """
import importlib.metadata, json, platform
import torch
names = ("torch", "triton", "megatron-core", "transformers", "transformer-engine", "flash-attn", "apex", "liger-kernel")
versions = {"Python": platform.python_version()}
for name in names:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
has_cuda = torch.cuda.is_available()
facts = {"device": "cuda" if has_cuda else "cpu", "versions": versions}
facts["cuda"] = torch.version.cuda if has_cuda else None
facts["name"] = torch.cuda.get_device_name() if has_cuda else platform.processor() or platform.machine()
facts["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9 if has_cuda else None
print(json.dumps(facts))
"""


def make_work_folder(folder: Path) -> Path:
    """Make the stages' current directory: the package under its installed layout, and the examples' files."""
    package = folder / "megatron_tropd"
    package.mkdir(parents=True)
    for entry in (ROOT / "megatron_tropd").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for name, source in _MAPPED.items():
        (package / name).symlink_to(ROOT / source)
    (folder / "examples").symlink_to(ROOT / "examples")  # recipes name files relative to the current directory
    return folder


def variables(work: Path) -> dict[str, str]:
    """Return the environment of the stages' processes."""
    given = os.environ.get("PYTHONPATH")
    paths = [str(work), str(ROOT / "tests"), *([given] if given else [])]
    fixed = {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "MASTER_PORT": str(_free_port()),
    }
    defaults = {
        "OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return {**defaults, **os.environ, **fixed}


def probe(work: Path) -> dict[str, Any]:
    """Return device, its name and memory, and the versions of what matters, as a process of the stages sees them."""
    command = [sys.executable, "-c", _PROBE]
    done = subprocess.run(command, cwd=work, env=variables(work), capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise SystemExit(f"no stage can run: {done.stderr.strip().splitlines()[-1]} (Python: {sys.executable})")
    return {**json.loads(done.stdout.splitlines()[-1]), "commit": _commit()}


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
