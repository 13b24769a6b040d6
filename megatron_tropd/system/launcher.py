"""What torchrun tells each of its processes, without torch; one process that was started alone is rank 0 of 1."""

from __future__ import annotations

import os


def launcher_rank() -> int:
    """Return this process's rank in the job."""
    return int(os.environ.get("RANK", 0))


def launcher_world_size() -> int:
    """Return the number of the job's processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher_local_world_size(default: int = 1) -> int:
    """Return the number of this node's processes."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", default))
