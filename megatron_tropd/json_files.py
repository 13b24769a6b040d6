"""Writes files whole or not at all, and never over a file that this program did not write."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a file whose existence says that it is whole; its folder is made."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: the old one stands until the new one is on the disk."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made, a link's target is replaced, not the link."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # no file of anybody else's
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def refuse_foreign(path: str | Path, is_ours: Callable[[Path], bool], what: str, option: str) -> None:
    """Raise UserError where `path` exists and is not what this program writes there.

    Args:
        path: of the file to be written.
        is_ours: whether an existing, non-empty file is one that an earlier run wrote; may raise ValueError or OSError.
        what: the kind of file, for the message.
        option: the option or key that names it.
    """
    path = Path(path)
    if not path.exists():
        return
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not a regular file"
        raise UserError(f"{option} {path} is {kind}; expected the name of a file to write {what} to.")
    try:
        ours = path.stat().st_size == 0 or is_ours(path)
    except (ValueError, OSError):
        ours = False
    if not ours:
        raise UserError(
            f"{option} {path} exists and is not {what} of this program: it is left as it is. Give another name, or "
            "move the file away."
        )


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a test for `refuse_foreign`: whether a file is a JSON object with all of these keys."""

    def test(path: Path) -> bool:
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and all(key in content for key in keys)

    return test
