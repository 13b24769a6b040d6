"""Training runs in one process: the summary or the refusal, and every byte that they leave in a folder."""

from __future__ import annotations

from pathlib import Path

from support.helpers import run_distributed
from support.train_runs import overrides_of, refused_rank, train_rank


def run(material: Path, folder: Path, *options: str) -> dict:
    return run_distributed(train_rank, 1, overrides_of(material, folder, *options))[0]


def refused(material: Path, folder: Path, *options: str) -> str:
    return run_distributed(refused_rank, 1, overrides_of(material, folder, *options))[0]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
