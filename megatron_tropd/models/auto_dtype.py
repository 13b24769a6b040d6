"""`student.dtype=auto` and `teacher.dtype=auto`: one decision of rank 0 for all ranks and both models.

with process_groups(recipe.student) as groups:
    resolve_dtypes(recipe)  # from here on both dtypes are names of torch's
"""

from __future__ import annotations

import logging

import torch

from megatron_tropd.config import Recipe
from megatron_tropd.machine.product_speed import product_speeds
from megatron_tropd.parallel.groups import from_rank_zero
from megatron_tropd.parallel.partition import Partition
from megatron_tropd.system.launcher import launcher_rank

logger = logging.getLogger(__name__)

AUTO = "auto"
MEANING = "bfloat16 on CUDA; on a CPU the faster of bfloat16 and float32, which rank 0 measures at the first start"


def auto_keys(recipe: Recipe) -> list[str]:
    """Return which of `student.dtype` and `teacher.dtype` are still auto."""
    return [f"{role}.dtype" for role in ("student", "teacher") if getattr(recipe, role).dtype == AUTO]


def resolve_dtypes(recipe: Recipe, partition: Partition | None = None) -> str | None:
    """Replace `auto` in `recipe`, which is changed, by the dtype for this job's devices; collective over all ranks.

    bfloat16 on CUDA; on a CPU the faster of bfloat16 and float32 in `product_speeds`, measured on rank 0. All ranks,
    and both models where both are auto, get the same. Rank 0 logs one line. A recipe without `auto` takes no time.

    Args:
        recipe: the same on every rank; a resumed run's keeps the dtypes of its checkpoint (`resume.prepare`), so that
            nothing of it is auto.
        partition: where the teacher has dedicated ranks; both parts then call this, and the student's rank 0 decides.
            Without it the default process group must have been started.

    Returns:
        What was decided and why, in words; None where nothing was auto.
    """
    keys = auto_keys(recipe)
    if not keys:
        return None
    dtype, reason = partition.from_first_rank(_decide) if partition else from_rank_zero(_decide)
    for key in keys:
        getattr(recipe, key.split(".")[0]).dtype = dtype
    text = f"{' and '.join(keys)}: auto is {dtype} {reason}"
    if launcher_rank() == 0:
        logger.info("%s", text)
    return text


def _decide() -> tuple[str, str]:
    """Return the dtype for this process's device, and why."""
    if torch.cuda.is_available():
        return "bfloat16", "on CUDA"
    speeds = product_speeds()
    dtype = max(speeds, key=lambda name: speeds[name])
    measured = ", ".join(f"{speed / 1e9:.0f} GFLOP/s in {name}" for name, speed in speeds.items())
    return dtype, f"on this CPU, whose matrix products reach {measured} ({torch.get_num_threads()} thread(s))"
