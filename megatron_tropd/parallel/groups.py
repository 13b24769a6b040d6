"""Process groups: built once from a layout, handed on as objects; the only reader of Megatron's parallel_state.

Works under torchrun (NCCL on CUDA, gloo on CPU) and in a single process without it. The student's groups are
Megatron's global ones; a teacher of another layout has a separate collection over the same ranks.

    groups = initialize(recipe.student, seed=recipe.training.seed)
    model = build_model(hf_config, recipe.student, groups)
    teacher_groups = build_groups(recipe.teacher, groups)       # the same object where the layouts are the same
"""

from __future__ import annotations

import datetime
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_tropd.config import ModelConfig
from megatron_tropd.parallel import cpu_compat
from megatron_tropd.parallel.layout import check_ranks, expert_tensor_parallel_size
from megatron_tropd.system.launcher import launcher_world_size
from megatron_tropd.types import UserError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tropd.parallel.partition import Partition

Made = TypeVar("Made")


@dataclass(frozen=True, eq=False)
class ParallelGroups:
    """One model's process groups, as Megatron's collection and under short names."""

    collection: ProcessGroupCollection
    virtual_pipeline_size: int | None
    device: torch.device
    timeout: datetime.timedelta = datetime.timedelta(minutes=30)  # of every collective
    host: tuple[dist.ProcessGroup, ...] = ()  # gloo's twins of dp_cp and of the experts' replicas; the student's only

    @property
    def tp(self) -> dist.ProcessGroup:
        """Tensor-parallel group."""
        return self.collection.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        """Pipeline-parallel group."""
        return self.collection.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        """Data-parallel group (without context parallelism)."""
        return self.collection.dp

    @property
    def cp(self) -> dist.ProcessGroup:
        """Context-parallel group."""
        return self.collection.cp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Data- and context-parallel group: over it the loss tokens are counted."""
        return self.collection.dp_cp

    @property
    def ep(self) -> dist.ProcessGroup:
        """Expert-parallel group: its ranks hold different experts."""
        return self.collection.ep

    @property
    def expert_tp(self) -> dist.ProcessGroup:
        """Tensor-parallel group of the experts' matrices."""
        return self.collection.expt_tp

    @property
    def lockstep(self) -> dist.ProcessGroup | None:
        """Ranks of several replicas that share experts: they must run as many forward passes; None: one replica."""
        group = self.collection.tp_ep
        return group if group.size() > self.tp_size * self.cp_size else None

    @property
    def mp(self) -> dist.ProcessGroup:
        """Model-parallel group: the tensor- and pipeline-parallel ranks of one replica."""
        return self.collection.mp

    tp_rank = property(lambda self: self.tp.rank())
    tp_size = property(lambda self: self.tp.size())
    pp_rank = property(lambda self: self.pp.rank())
    pp_size = property(lambda self: self.pp.size())
    dp_rank = property(lambda self: self.dp.rank())
    dp_size = property(lambda self: self.dp.size())
    cp_rank = property(lambda self: self.cp.rank())
    cp_size = property(lambda self: self.cp.size())
    rank = property(lambda self: dist.get_rank())
    world_size = property(lambda self: dist.get_world_size())

    @property
    def micro_batch_multiple(self) -> int:
        """Megatron's schedule takes micro-batches in groups of this many: the pipeline's size where it interleaves."""
        return self.pp_size if self.virtual_pipeline_size else 1

    @property
    def context_multiple(self) -> int:
        """Sequences are split into this many chunks: two for each context-parallel rank, where there are several."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def token_multiple(self, model: ModelConfig | TransformerConfig) -> int:
        """Tokens of a micro-batch are rounded up to it: sequence and context parallelism shard them.

        Each shard then has a multiple of 8, or of the 32 that 8-bit matrix products want.
        """
        return (32 if model.fp8 else 8) * self.context_multiple * (self.tp_size if model.sequence_parallel else 1)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_reporter(self) -> bool:
        """Whether this rank writes metrics: the only one with data-parallel rank 0 on the last stage, tp rank 0."""
        return self.is_last_stage and self.tp_rank == 0 and self.dp_rank == 0 and self.cp_rank == 0


def initialize(
    layout: ModelConfig,
    seed: int = 1234,
    backend: str | None = None,
    use_cpu_compat: bool = True,
    partition: Partition | None = None,
    timeout_minutes: int = 30,
    role: str | None = None,
) -> ParallelGroups:
    """Start torch.distributed and Megatron's process groups for `layout`, and seed every generator.

    Args:
        layout: parallel sizes; the rest of the processes form the data-parallel dimension.
        seed: Megatron's usual arrangement: tensor-parallel ranks share it outside tensor-parallel regions.
        backend: default nccl with CUDA, else gloo.
        use_cpu_compat: apply `cpu_compat` where there is no CUDA.
        partition: this process's part of the job, which is then all that `layout` has.
        timeout_minutes: how long a rank waits in a collective for the others.
        role: "student" or "teacher", for the names of keys in an error.

    Raises:
        UserError: the number of processes is no multiple of the layout's ranks.
    """
    if use_cpu_compat:
        cpu_compat.apply()
    has_cuda = torch.cuda.is_available()
    if partition:
        check_ranks(layout, partition.size, partition.role, partition.other_size)
    else:
        world_size = launcher_world_size()
        check_ranks(layout, dist.get_world_size() if dist.is_initialized() else world_size, role)
    if has_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        _start_distributed(backend or ("nccl" if has_cuda else "gloo"), partition, timeout)
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        context_parallel_size=layout.context_parallel_size,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
    )
    collection = ProcessGroupCollection.use_mpu_process_groups()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
    host = (
        parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
        parallel_state.get_expert_data_parallel_group_gloo(),
    )
    return ParallelGroups(collection, layout.virtual_pipeline_model_parallel_size, device, timeout, host)


def _start_distributed(backend: str, partition: Partition | None, timeout: datetime.timedelta) -> None:
    """Make the default process group: of this part of the job, of torchrun's processes, or of this one alone."""
    # With expandable segments, buffers that NCCL registers for a CUDA graph may have moved when it is replayed.
    os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    if partition:
        own, rank, size = partition.store, partition.rank, partition.size
        dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=size)
    elif "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore(), timeout=timeout)


def build_groups(layout: ModelConfig, groups: ParallelGroups, role: str = "teacher") -> ParallelGroups:
    """Return process groups of another layout over all ranks, beside those of `initialize`; collective.

    Rank order, fastest first, as in Megatron: tp, cp, dp, pp; for MoE experts: etp, ep, dp, pp. A
    layout of the same sizes gets `groups` itself.

    Args:
        layout: parallel sizes of the other model.
        groups: from `initialize`.
        role: of the other model, for error messages.

    Raises:
        UserError: the number of processes is no multiple of the layout's ranks.
    """
    tp, pp, cp = (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
    )
    ep, etp = layout.expert_model_parallel_size, expert_tensor_parallel_size(layout)
    virtual = layout.virtual_pipeline_model_parallel_size
    experts = (groups.ep.size(), groups.expert_tp.size())
    same = (groups.tp_size, groups.pp_size, groups.cp_size, groups.virtual_pipeline_size, *experts)
    if (tp, pp, cp, virtual, ep, etp) == same:
        return groups
    check_ranks(layout, groups.world_size, role)
    dp = groups.world_size // (tp * pp * cp)
    order = "tp-cp-ep-dp-pp"
    ranks = parallel_state.RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=cp, order=order)
    expert_dp = groups.world_size // (etp * ep * pp)
    expert_ranks = parallel_state.RankGenerator(tp=etp, ep=ep, dp=expert_dp, pp=pp, cp=1, order=order)

    def group(lists: list[list[int]]) -> dist.ProcessGroup:
        return dist.new_subgroups_by_enumeration(lists, timeout=groups.timeout)[0]

    dims = {"tp": "tp", "cp": "cp", "pp": "pp", "dp": "dp", "mp": "tp-pp", "dp_cp": "dp-cp"}
    dims |= {"tp_cp": "tp-cp", "tp_dp_cp": "tp-dp-cp"}
    built: dict[str, dist.ProcessGroup | None] = {n: group(ranks.get_ranks(token)) for n, token in dims.items()}
    pipelines = ranks.get_ranks("pp")
    built["embd"] = _end_groups(pipelines, parallel_state.default_embedding_ranks, groups.timeout)
    built["pos_embd"] = _end_groups(pipelines, parallel_state.default_position_embedding_ranks, groups.timeout)
    expert_dims = {"ep": "ep", "expt_tp": "tp", "tp_ep": "tp-ep", "tp_ep_pp": "tp-ep-pp", "expt_dp": "dp"}
    built |= {name: group(expert_ranks.get_ranks(token)) for name, token in expert_dims.items()}
    return ParallelGroups(ProcessGroupCollection(**built), virtual, groups.device, groups.timeout)


def _end_groups(
    pipelines: list[list[int]], choose: Callable[[list[int]], list[int]], timeout: datetime.timedelta
) -> dist.ProcessGroup | None:
    """Make one group of the chosen ranks of every pipeline; return this rank's, None if it is in none."""
    mine = None
    for ranks in map(choose, pipelines):
        made = dist.new_group(ranks, timeout=timeout)
        if dist.get_rank() in ranks:
            mine = made
    return mine


def shutdown() -> None:
    """Destroy Megatron's groups and torch.distributed; waits for all ranks; safe to call twice."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def all_shards(tensor: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return every rank's tensor, all of one shape, in the order of the group's ranks; collective, no gradient."""
    if group.size() == 1:
        return [tensor]
    shards = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    return shards


def any_rank(here: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether it is so on any rank of a group, by default of all; collective."""
    anywhere = torch.tensor(int(here), device=torch.cuda.current_device())
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=group)
    return bool(anywhere)


def on_rank_zero(action: Callable[[], object]) -> None:
    """Run `action` on rank 0 between barriers; its failure is raised on every rank, so that none waits forever.

    Raises:
        UserError: rank 0 raised one.
        RuntimeError: rank 0 raised anything else.
    """
    dist.barrier()
    failure: list[tuple[bool, str] | None] = [None]
    cause: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except BaseException as error:  # torch's CheckpointException is no Exception
            cause, is_user_error = error, isinstance(error, UserError)
            failure[0] = (is_user_error, str(error) if is_user_error else f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        is_user_error, message = failure[0]
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause
        raise (UserError(message) if is_user_error else RuntimeError(f"rank 0 failed: {message}")) from cause


def from_rank_zero(make: Callable[[], Made]) -> Made:
    """Return, on every rank, what `make` returns on rank 0; collective. Its failure is raised as by `on_rank_zero`."""
    made: list[Any] = [None]

    def keep() -> None:
        made[0] = make()

    on_rank_zero(keep)
    dist.broadcast_object_list(made, src=0)
    return made[0]
