"""Lets one command at a time write to a run's folders or to an output; the system releases the lock of a dead process.

with RunLock() as lock:
    lock.probe([folder])  # refuse early; writes nothing
    lock.take([folder])   # held to the end of the block
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from pathlib import Path
from typing import IO

from megatron_tropd.errors import UserError

logger = logging.getLogger(__name__)

_FILE = ".lock"


class RunLock:
    """Locks on folders and files, each by a hidden file in or beside it, held by one process.

    A file that a killed run left is not held. File systems without locks are ignored.
    """

    def __init__(self) -> None:
        self._held: list[tuple[Path, IO[str]]] = []

    def probe(self, folders: list[Path]) -> None:
        """Raise UserError if another process holds one of the folders; writes nothing, holds nothing."""
        for folder in folders:
            with contextlib.suppress(FileNotFoundError), open(folder / _FILE, encoding="utf-8") as file:
                _lock(file, folder, fcntl.LOCK_SH)

    def take(self, folders: list[Path]) -> None:
        """Hold folders, which are made if missing; UserError if another process holds one."""
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            folder.mkdir(parents=True, exist_ok=True)
            self._take(folder / _FILE, folder)

    def take_file(self, path: Path) -> None:
        """Hold a single file in an existing folder; UserError if another process holds it."""
        path = path.resolve()
        self._take(path.with_name(f".{path.name}{_FILE}"), path)

    def _take(self, path: Path, what: Path) -> None:
        file = _open_locked(path, what)
        self._held.append((path, file))
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *exception: object) -> None:
        for path, file in self._held:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # while it is held
            file.close()
        self._held.clear()


def _open_locked(path: Path, what: Path) -> IO[str]:
    while True:
        try:
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  (open as long as the lock is held)
        except OSError as error:
            raise UserError(f"{what} cannot be written to ({error.strerror}); give another place.") from error
        try:
            _lock(file, what, fcntl.LOCK_EX)
        except UserError:
            file.close()
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file
        file.close()  # its holder removed it between the two calls


def _lock(file: IO[str], what: Path, mode: int) -> None:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"another command is writing to {what} ({file.read() or 'unknown'}). Wait for it to end, or "
            f"give another place; if that process is gone with its node, remove {file.name}."
        ) from None
    except OSError as error:
        logger.info("%s cannot be locked (%s): let no two commands write to it at once", what, error.strerror)
