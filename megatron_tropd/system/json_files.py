"""Writes files whole or not at all, and never over a file that this program did not write."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError

_ROOM = "make room, get permission, or give another place"


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write a file that is complete whenever it exists; its folder is made."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all: the old one stands until the new one is on the disk."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all; its folder is made, a link's target is replaced, not the link.

    Raises:
        UserError: it cannot be written, such as on a full disk; the old one stands.
    """
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")  # no file of anybody else's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"{path} cannot be written ({error.strerror}); {_ROOM}.") from error
        raise


def refuse_unwritable(folder: str | Path, option: str) -> None:
    """Raise UserError where files cannot be written to `folder`, which need not exist yet; nothing is written.

    Args:
        folder: of the files to be written.
        option: the option or key that names it, or a file in it.
    """
    folder = Path(folder).absolute()
    place = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not place.is_dir():
        raise UserError(f"{option}: {place} is no folder, so nothing can be written there; give another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(
            f"{option}: {place} cannot be written to (its permissions, or a read-only file system); {_ROOM}."
        )


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
        named = f"{option} {path}, which is" if option.endswith("holds") else f"{option} {path} exists and is"
        raise UserError(
            f"{named} not {what} of this program: it is left as it is. Give another name, or move the file away."
        )


def has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a test for `refuse_foreign`: whether a file is a JSON object with all of these keys."""

    def test(path: Path) -> bool:
        content = json.loads(path.read_text(encoding="utf-8"))
        return isinstance(content, dict) and all(key in content for key in keys)

    return test
