"""GPU memory beside PyTorch's tensors: CUDA context, workspaces, and NCCL's buffers by process group.

runtime_parts(job, ("student", "teacher"))   # of a GPU that holds both models; bytes by part
"""

from __future__ import annotations

from megatron_tropd.config import ModelConfig
from megatron_tropd.parallel.layout import expert_tensor_parallel_size, model_ranks
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.sizes import expert_ranks


def runtime_parts(job: Job, roles: tuple[str, ...]) -> dict[str, float]:
    """Return the bytes of each part on a GPU that holds the models of `roles`; nothing on a CPU."""
    if not job.fused:
        return {}
    gpu = job.gpu
    groups, peers = nccl_connections(job, roles)
    parts = {
        "CUDA context": gpu.context_gb * 1e9,
        "workspaces": gpu.workspaces_gb * 1e9,
        "NCCL": (groups * gpu.communicator_gb + peers * gpu.peer_gb) * 1e9,
    }
    if "student" in roles:
        parts["CUDA graphs"] = job.captured_sizes * gpu.graph_gb * 1e9
    return parts


def nccl_connections(job: Job, roles: tuple[str, ...]) -> tuple[int, int]:
    """Return how many groups of a rank run collectives, and how many peers it exchanges tokens with.

    A teacher of the student's layout has the student's groups. A group of one rank has no buffers.
    """
    groups = 1 if max(job.gpus_of(role) for role in roles) > 1 else 0  # all ranks: barriers, checkpoints, the exchange
    peers, layouts = 0, []
    for role in roles:
        model = getattr(job.recipe, role)
        layout = (*_sizes(model), model.virtual_pipeline_model_parallel_size)
        if layout not in layouts:
            layouts.append(layout)
            groups += sum(size > 1 for size in group_sizes(model, job.gpus_of(role)).values())
            peers += model.expert_model_parallel_size - 1  # tokens on their way to experts
    if len(layouts) > 1:  # a student replica receives the scores of all teacher replicas that share its rows
        peers += max(0, job.replicas("teacher") // job.replicas("student") - 1)
    return groups, peers


def group_sizes(model: ModelConfig, gpus: int) -> dict[str, int]:
    """Return the ranks of each of a model's groups that Megatron's training runs collectives in."""
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    sizes = {
        "tensor parallel": tp,
        "context parallel": cp,
        "pipeline parallel": pp,
        "data and context parallel": gpus // model_ranks(model) * cp,
        "model parallel": tp * pp,  # the gradient's norm
    }
    if model.expert_model_parallel_size > 1:
        sizes["expert parallel"] = model.expert_model_parallel_size
        sizes["experts' tensor parallel"] = expert_tensor_parallel_size(model)
        sizes["experts' data parallel"] = gpus // expert_ranks(model)
    return sizes


def _sizes(model: ModelConfig) -> tuple[int, ...]:
    dense = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    return (*dense, model.expert_model_parallel_size, expert_tensor_parallel_size(model))
