"""Memory of one node's host: what is offloaded to it between phases, and what saving a checkpoint gathers in it.

host_memory(job)   # bytes by part, of the node where most of it lies
"""

from __future__ import annotations

from megatron_tropd.parallel.layout import model_ranks
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import memories
from megatron_tropd.planning.sizes import stage_parameters
from megatron_tropd.rounding import ceil_div

# PyTorch rounds each pinned tensor up to a power of two: 18 % more for Llama-3.1-70B at TP=8.
_PINNED_ROUNDING = 1.2
# Of each parameter, fp32: the main weight and Adam's two moments.
_SAVED_BYTES = 12
# While one of the three is gathered: its pieces, and the pieces joined.
_GATHERING_BYTES = 8


def host_memory(job: Job) -> dict[str, float]:
    """Return the bytes on the host of the node that holds most; parts that are not needed are 0."""
    weights = optimizer = 0.0
    for fullest in memories(job):
        if job.recipe.teacher.offload:
            weights = max(weights, fullest.parts.get("teacher weights", 0.0))
        if job.recipe.training.offload_optimizer:
            optimizer = max(optimizer, fullest.parts.get("optimizer", 0.0))
    gpus = min(job.gpu.node_gpus, job.gpus_of("student"))
    offloaded = gpus * (weights * _PINNED_ROUNDING + optimizer)
    return {"offloaded": offloaded, "checkpoint": _checkpoint_bytes(job)}


def _checkpoint_bytes(job: Job) -> float:
    """Return what saving, and likewise loading, the distributed optimizer takes on the first node.

    The first rank of each data-parallel group gathers its group's whole state on the host, and no GPU memory is
    needed; the other ranks copy their own part there.
    """
    model, gpus = job.recipe.student, job.gpus_of("student")
    parameters = max(stage.total for stage in stage_parameters(job.student, model))
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    here = min(job.gpu.node_gpus, gpus)
    stage_ranks = gpus // pp  # ranks go tp, cp, dp, pp: a stage's are adjacent, its gatherers the first of them
    gatherers = min(tp, here) * min(pp, ceil_div(here, stage_ranks))
    if not job.recipe.training.use_distributed_optimizer:
        return gatherers * parameters * _SAVED_BYTES
    shards = gpus // model_ranks(model) * model.context_parallel_size
    others = (here - gatherers) * parameters * _SAVED_BYTES / shards
    return gatherers * parameters * (_SAVED_BYTES + _GATHERING_BYTES) + others
