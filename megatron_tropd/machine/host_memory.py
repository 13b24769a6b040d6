"""Host memory that this process may still take: of the machine, or of the container's limit."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")
_FILES = (  # of versions 2 and 1: limit, use, and the name of the part of it that is reclaimable page cache
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    *(("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),),
)


def available_host_bytes(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that can be allocated without swapping or being killed; `cgroup`: where limits are mounted."""
    available = psutil.virtual_memory().available
    for limit, usage, stat, cache in _FILES:
        try:
            free = int((cgroup / limit).read_text()) - int((cgroup / usage).read_text())
            parts = dict(line.split() for line in (cgroup / stat).read_text().splitlines())
            available = min(available, max(0, free + int(parts.get(cache, 0))))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return available
