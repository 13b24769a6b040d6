"""A folder's list of files and sizes, written last, so that an incomplete folder is recognised."""

from __future__ import annotations

import json
import os
from pathlib import Path

MANIFEST = "complete.json"


def write_manifest(folder: str | Path) -> None:
    """Write `complete.json` with every file's size, and flush it to the disk."""
    folder = Path(folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    with open(folder / MANIFEST, "w") as file:
        json.dump({str(p.relative_to(folder)): p.stat().st_size for p in files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def find_damage(folder: str | Path) -> str | None:
    """Compare a folder with its manifest; return what is wrong, or None if it is whole."""
    folder = Path(folder)
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        sizes = None
    if not isinstance(sizes, dict):
        return f"{MANIFEST} is missing or unreadable"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None
