"""Megatron-Core's private parts and the differences between its versions 0.16 to 0.19; nothing else touches them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import LocalNonpersistentObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_model_config
from packaging.version import Version

from megatron_tropd.errors import UserError
from megatron_tropd.system.safe_pickles import check_folder

MEGATRON_VERSION = Version(metadata.version("megatron-core"))


def unwrap_model(model: Any) -> Any:
    """Return the GPTModel under Megatron's wrappers (DistributedDataParallel, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


def keep_adam_step_on_load(optimizer: Any) -> None:
    """Fix loading of `fully_reshardable` optimizer checkpoints with torch's AdamW.

    Its state holds 'step' beside the moments; Megatron-Core stores the step once for all parameters and then looks for
    it among the loaded tensors of each (KeyError 'step' in 0.16). Here the step set from the common state is kept.
    """
    for distributed in _distributed_optimizers(optimizer):
        original = distributed._set_main_param_and_optimizer_states

        def set_states(
            model_param: torch.nn.Parameter,
            tensors: dict[str, torch.Tensor],
            distributed: DistributedOptimizer = distributed,
            original: Callable[..., None] = original,
        ) -> None:
            group_index, group_order = distributed.model_param_group_index_map[model_param]
            main_param = distributed.optimizer.param_groups[group_index]["params"][group_order]
            step = distributed.optimizer.state[main_param].get("step")
            if isinstance(step, torch.Tensor) and "step" not in tensors:
                tensors = {**tensors, "step": step}
            original(model_param, tensors)

        distributed._set_main_param_and_optimizer_states = set_states
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if isinstance(getattr(member, "optimizer", None), (torch.optim.Adam, torch.optim.AdamW)):
            _load_step_of_zero(member.optimizer)


def _load_step_of_zero(adam: torch.optim.Optimizer) -> None:
    """Let torch's Adam load the state of no update, whose step of 0 Megatron-Core takes for none and does not save."""
    load = adam.load_state_dict

    def load_with_step(saved: dict[str, Any]) -> None:
        for state in saved["state"].values():
            if "exp_avg" in state:
                state.setdefault("step", torch.tensor(0.0))
        load(saved)

    adam.load_state_dict = load_with_step  # type: ignore[method-assign, assignment]  # of this optimizer alone


def mend_router_without_transformer_engine() -> None:
    """Define a name that the experts' router looks up and that is there with Transformer Engine alone (0.16)."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def recompute_in_training_only(model: torch.nn.Module) -> None:
    """Let MLPs and experts be recomputed after forward passes in train mode alone.

    Megatron-Core (0.16 to 0.19) also sends a rollout's forward passes through the checkpoint of a recomputed MLP, which
    copies the states of random generators at every token and cannot be captured in a CUDA graph.
    """
    names = ("recompute_mlp", "moe_layer_recompute")
    switches = [(module, name) for module in model.modules() for name in names if getattr(module, name, False)]

    def switch(module: torch.nn.Module, _: Any) -> None:
        for owner, name in switches:
            setattr(owner, name, module.training)

    if switches:
        model.register_forward_pre_hook(switch)


def is_of_experts(layer_submodules: Any) -> bool:
    """Whether a layer's spec builds experts: 0.18 and later name the class in a partial function, before in a spec."""
    mlp = layer_submodules.mlp
    return getattr(mlp, "func", None) is MoELayer or getattr(mlp, "module", None) is MoELayer


def allocate_optimizer_state(optimizer: Any) -> None:
    """Give an optimizer that has made no update yet the state of one that has: moments and steps of zero.

    Loading a checkpoint overwrites it; with torch's AdamW, Megatron-Core reads the step off it even then. Saving needs
    it where all steps so far were skipped. The parameters do not move: the learning rate is 0 meanwhile. For SGD
    Megatron-Core has no function that makes the state, and calls it all the same (0.16 to 0.19).
    """
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        if getattr(member, "init_state_fn", True) is None:
            member.init_state_fn = _allocate_momentum
        inner = member.optimizer
        if inner is None or len(inner.state):  # None: a rank without parameters of that kind
            continue
        rates = [group["lr"] for group in inner.param_groups]
        for group in inner.param_groups:
            group["lr"] = 0.0
            for parameter in (p for p in group["params"] if p.numel()):
                parameter.grad = torch.zeros_like(parameter)
        inner.step()
        inner.zero_grad()
        for group, rate in zip(inner.param_groups, rates, strict=True):
            group["lr"] = rate
            if "step" in group:  # of Transformer Engine's FusedAdam
                group["step"] = group["step"] * 0
        for state in inner.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].zero_()


def _allocate_momentum(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("momentum") else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.data))


def separate_adam_steps(optimizer: Any) -> None:
    """Give each parameter its own step counter after a load.

    Megatron-Core hands torch's AdamW one tensor for all of them, which every parameter's update then advances.
    """
    for distributed in _distributed_optimizers(optimizer):
        for state in distributed.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def step_optimizer(optimizer: Any, accept: Callable[[float], bool]) -> tuple[bool, float | None]:
    """Step Megatron's optimizer where `accept` agrees to the gradient's norm; what is refused leaves no trace.

    Megatron-Core asks for the norm and then updates, in one method. Where a loss scale overflows it does neither.

    Args:
        optimizer: from get_megatron_optimizer.
        accept: global norm of the gradient -> whether to update; asked on every rank.

    Returns:
        Whether the parameters were updated, and the norm; None where the loss scale overflowed.
    """
    norms: list[float] = []
    find_norm, update = optimizer.get_grad_norm, optimizer.step_with_ready_grads

    def remember() -> Any:
        norm = find_norm()
        norms.append(float(norm or 0.0))
        return norm

    optimizer.get_grad_norm = remember
    optimizer.step_with_ready_grads = lambda: accept(norms[-1]) and update()
    try:
        updated, _, _ = optimizer.step()
    finally:
        del optimizer.get_grad_norm, optimizer.step_with_ready_grads
    return updated, norms[-1] if norms else None


def checkpoint_on_one_rank(optimizer: Any, host_groups: Sequence[dist.ProcessGroup]) -> None:
    """Let the first data-parallel rank alone save and load `fully_reshardable` checkpoints, for all of them.

    Otherwise each of these ranks holds all of the parameters, exp_avg and exp_avg_sq of its model-parallel shard in
    host memory: 12 bytes a parameter, times the ranks of a machine. Megatron-Core can save like this, through gloo
    groups that it takes only without explicit process groups; it always loads everything on every rank.

    Args:
        optimizer: from get_megatron_optimizer.
        host_groups: gloo groups, one of them with the ranks of each distributed optimizer.
    """
    by_ranks = {tuple(dist.get_process_group_ranks(group)): group for group in host_groups}
    for distributed in _distributed_optimizers(optimizer):
        group = by_ranks[tuple(dist.get_process_group_ranks(distributed.data_parallel_group))]
        distributed.data_parallel_group_gloo = group
        if group.size() > 1:
            _load_on_one_rank(distributed, group)


def _load_on_one_rank(distributed: DistributedOptimizer, group: dist.ProcessGroup) -> None:
    sharded_state = distributed.sharded_param_state_fully_reshardable

    def sharded_state_of_one_rank(model_state: Any, is_loading: bool = False, metadata: Any = None) -> Any:
        state = None
        if group.rank() == 0 or not is_loading:
            state = sharded_state(model_state, is_loading, metadata)
        # An entry of no file's, so that `load` is called on the other ranks, too.
        return LocalNonpersistentObject(None) if state is None else state

    def load(loaded: dict[int, dict[str, torch.Tensor]] | None) -> None:
        names: list[Any] = [sorted(set(loaded[0]) - {"step"}) if loaded else None]
        source = dist.get_process_group_ranks(group)[0]
        dist.broadcast_object_list(names, src=source, group=group)
        for index, (parameter, size, own) in enumerate(_parameters_in_order(distributed)):
            tensors = {}
            for name in names[0]:
                whole = loaded[index][name].flatten() if loaded else torch.empty(size, dtype=torch.float32)
                dist.broadcast(whole, src=source, group=group)
                if own is not None:
                    tensors[name] = whole[own.start : own.end]
            if own is not None:
                distributed._set_main_param_and_optimizer_states(parameter, tensors)

    distributed.sharded_param_state_fully_reshardable = sharded_state_of_one_rank
    distributed.load_parameter_state_from_fully_reshardable = torch.no_grad()(load)


def _parameters_in_order(distributed: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, int, Any]]:
    """Yield (parameter, its elements, this rank's range of them or None), as checkpoints number the parameters."""
    for buffer, ranges in zip(distributed.buffers, distributed.gbuf_ranges, strict=True):
        (buckets,) = ranges.values()  # one dtype a buffer
        own = {parameter: places["param"] for b in buckets for parameter, places in b["param_map"].items()}
        for parameter, (start, end, _) in buffer.param_index_map.items():
            yield parameter, end - start, own.get(parameter)


def _distributed_optimizers(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [o for o in chained if isinstance(o, DistributedOptimizer)]


def run_schedule(
    groups: Any,
    forward_step_func: Callable,
    microbatches: Sequence[Any],
    chunks: list[Any],
    seq_length: int,
    micro_batch_size: int,
    forward_only: bool,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    """Run Megatron's pipeline schedule over `microbatches` with explicit process groups.

    Args:
        groups: the model's parallel.ParallelGroups.
        forward_step_func: Megatron's forward_step(data_iterator, model) -> (output, loss_func).
        microbatches: one item a micro-batch; each model chunk gets its own iterator over them.
        chunks: this rank's model chunks (one without interleaving).
        seq_length: padded length of every micro-batch.
        micro_batch_size: rows of every micro-batch.
        forward_only: no backward pass.
        collect_non_loss_data: return what loss_func returned, as it is.

    Returns:
        What the schedule collected: one item a micro-batch on the last stage, nothing elsewhere.
    """
    config = get_model_config(chunks[0])
    forward_backward = get_forward_backward_func(pp_size=groups.pp_size, vp_size=groups.virtual_pipeline_size)
    iterators = [iter(microbatches) for _ in chunks]
    single = groups.virtual_pipeline_size is None
    pipeline = {} if groups.pp_size == 1 else {"p2p_communicator": P2PCommunicator(groups.pp, config)}
    return forward_backward(
        forward_step_func=forward_step_func,
        data_iterator=iterators[0] if single else iterators,
        model=chunks[0] if single else chunks,
        num_microbatches=len(microbatches),
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect_non_loss_data,
        pg_collection=groups.collection,
        **pipeline,
    )


def save_sharded(state: dict[str, Any], directory: str) -> None:
    """Write a sharded state dict with Megatron's distributed checkpointing, synchronously; collective.

    Megatron passes the writers' results through a queue in a separate process, which costs seconds to start and
    outlives a rank that is killed. A synchronous save puts and gets in one process: a plain queue does.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, directory)


def load_sharded(state: dict[str, Any], directory: str) -> dict[str, Any]:
    """Read a sharded state dict with Megatron's distributed checkpointing; collective.

    Raises:
        UserError: the folder holds pickles of more than plain data, or it cannot be read; the message names it.
    """
    check_folder(directory)
    with refusing_unreadable(directory):
        return dist_checkpointing.load(state, directory)


@contextmanager
def refusing_unreadable(directory: str | Path) -> Iterator[None]:
    """Within the context whatever Megatron and torch raise about a checkpoint's files becomes a UserError."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception; its text ends with the cause
        cause = (str(error).strip().splitlines() or [""])[-1]
        raise UserError(
            f"checkpoint {directory} cannot be read ({type(error).__name__}: {' '.join(cause.split())[:400]}). "
            "Restore the folder, or move it away to go on from the checkpoint before it."
        ) from error


# By these the groups of Megatron's optimizers are told apart; 0.19 also matches by settings, such as max_lr.
_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")


def put_settings_in_force(state: Any, optimizer: Any) -> None:
    """Give a loaded optimizer state the settings of `optimizer`: its rates, decays, betas, not the checkpoint's.

    Args:
        state: of `optimizer.sharded_state_dict`, loaded and not yet handed to `optimizer.load_state_dict`; changed.
        optimizer: fresh from get_megatron_optimizer.

    Raises:
        UserError: the state has no group of parameters for one of the optimizer's.
    """
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [state] if len(chained) == 1 else [state[i] for i in range(len(chained))]
    for part, one in zip(parts, chained, strict=True):
        saved = part.get("optimizer", part)["param_groups"]
        ours = {_group_of(group): group for group in one.param_groups}
        for group in saved:
            if _group_of(group) in ours:
                group.update({k: v for k, v in ours[_group_of(group)].items() if k not in ("params", "step")})


def _group_of(group: dict[str, Any]) -> tuple:
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in _GROUP_KEYS)
