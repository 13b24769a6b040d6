"""Disk space: checked before something is written, and named in the error if a write fails for lack of it."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.errors import UserError

logger = logging.getLogger(__name__)

_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch's writers report a write that came short in their own words.
_WORDS = ("No space left", "Disk quota exceeded", "File too large", "unexpected pos", "PytorchStreamWriter failed")
_OTHER = 1 << 20  # bytes of indices, tokenizer, random states


def check_room(folder: str | Path, needed: int, what: str, remedy: str) -> None:
    """Raise UserError if the file system of `folder`, which need not exist yet, has less than `needed` bytes free."""
    free = free_bytes(folder)
    if free < needed:
        raise UserError(f"{folder} has {show(free)} free, and {what} takes {show(needed)}; {remedy}.")


def free_bytes(folder: str | Path) -> int:
    """Return the free bytes of the file system that holds, or will hold, a folder."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def folder_bytes(folder: str | Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def checkpoint_bytes(chunks: list[torch.nn.Module], optimizer: Any, groups: Any) -> int:
    """Estimate the bytes of a training checkpoint: weights in their type, optimizer in fp32; collective.

    Args:
        chunks: this rank's bare model chunks.
        optimizer: Megatron's OptimizerConfig.
        groups: the student's parallel.ParallelGroups.
    """
    moments = 8 if optimizer.optimizer == "adam" else 4
    # In fp32 the parameters are their own main weights, which a distributed optimizer stores all the same.
    main = 4 if optimizer.use_distributed_optimizer or optimizer.params_dtype != torch.float32 else 0
    total = 0
    for parameter in (p for chunk in chunks for p in chunk.parameters()):
        is_expert = not getattr(parameter, "allreduce", True)
        replicas = groups.collection.expt_dp if is_expert else groups.dp_cp
        if replicas.rank() == 0:
            total += parameter.numel() * (parameter.element_size() + main + moments)
    over_all = torch.tensor(total, dtype=torch.int64, device=groups.device)
    dist.all_reduce(over_all)
    return int(over_all) + _OTHER


def check_checkpoints(folder: Path, existing: list[Path], size: int, keep: int, saves: int) -> None:
    """Raise UserError if the checkpoints of a run will not fit; warn where only not all of them will.

    Args:
        folder: of the checkpoints.
        existing: those that are there already, which later ones replace.
        size: bytes of one.
        keep: `checkpoint.keep`.
        saves: how many are still to be written.
    """
    if not saves:
        return
    most = saves + len(existing) if keep == 0 else min(saves + len(existing), keep + 1)  # one more while it is written
    needed = max(size, most * size - sum(map(folder_bytes, existing)))
    if keep == 0 and size <= free_bytes(folder) < needed:
        logger.warning(
            "%s has %s free, and the run will write %d checkpoints of %s: they will not all fit",
            *(folder, show(free_bytes(folder)), saves, show(size)),
        )
        return
    what = f"one checkpoint takes about {show(size)}, and with checkpoint.keep={keep} there are up to {most} of them"
    check_room(folder, needed, f"{what}, which", "make room, give another checkpoint.dir, or lower checkpoint.keep")


@contextlib.contextmanager
def room_or_refusal(temporary: Path, final: Path, needed: int, remedy: str) -> Iterator[None]:
    """Turn a write that fails because the disk is full into a UserError, and remove what was written by then.

    Args:
        temporary: the folder that is being written.
        final: the name that it will get.
        needed: bytes that it takes, for the message.
        remedy: what stands and what to do, a sentence.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not _is_about_room(error):
            raise
        written, free = folder_bytes(temporary), free_bytes(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"no room for {final}: it takes about {show(needed)}, {show(written)} of it could be written, and "
            f"{show(free)} were then free in {final.parent} (where that is enough, a quota or a limit on file sizes "
            f"was reached). What was written of it is removed. {remedy}"
        ) from error


def _is_about_room(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            return True
        causes = [getattr(failure, "args", (failure,))[0] for failure in getattr(error, "failures", {}).values()]
        if any(word in text for text in map(str, (error, *causes)) for word in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def show(size: int) -> str:
    """Return a number of bytes in the largest unit that leaves a digit before the point."""
    amount: float = size
    for unit in ("bytes", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{size} bytes" if unit == "bytes" else f"{amount:.3g} {unit}"
        amount /= 1000
    raise AssertionError
