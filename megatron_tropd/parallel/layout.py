"""Arithmetic of parallel layouts, without torch: ranks of a replica, and which layouts a number of processes can hold.

Training (parallel/groups.py) and `megatron-tropd plan` ask the same functions, so that no plan passes what training
refuses.

    check_ranks(recipe.student, world_size=8, role="student")   # UserError where 8 processes cannot hold the layout
"""

from __future__ import annotations

import math

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, smallest first: what an error names as sizes that would work."""
    return [d for d in range(1, number + 1) if number % d == 0]


def model_ranks(model: ModelConfig) -> int:
    """Return the ranks of one replica."""
    sizes = (model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size)
    return math.prod(sizes)


def expert_tensor_parallel_size(model: ModelConfig) -> int:
    """Return how many ranks share each expert's matrices: default: tensor_model_parallel_size."""
    return model.expert_tensor_parallel_size or model.tensor_model_parallel_size


_SHORT = {"TP": "tensor_model", "PP": "pipeline_model", "VPP": "virtual_pipeline_model", "CP": "context"}
_SHORT |= {"EP": "expert_model", "ETP": "expert_tensor"}


def short_sizes(model: ModelConfig, always: tuple[str, ...] = ("TP", "PP")) -> list[str]:
    """Return a layout's parallel sizes as people write them: `TP=2`, `PP=1`, …

    Args:
        model: has the sizes.
        always: those that are named even where they are 1.
    """
    sizes = {short: getattr(model, f"{name}_parallel_size") or 1 for short, name in _SHORT.items()}
    return [f"{short}={size}" for short, size in sizes.items() if size > 1 or short in always]


def check_ranks(layout: ModelConfig, world_size: int, role: str | None = None, others: int = 0) -> None:
    """Refuse a layout that a number of processes cannot hold.

    Args:
        layout: parallel sizes of one model.
        world_size: processes that the model has.
        role: "student" or "teacher", for the names of keys in the message.
        others: processes beside these that belong to the other model alone.

    Raises:
        UserError: `world_size` is no multiple of a replica's ranks or of an expert set's, or neither of the two
            divides the other.
    """
    pp = {"pipeline_model_parallel_size": layout.pipeline_model_parallel_size}
    dense = {
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
    }
    experts = {
        "expert_tensor_parallel_size": expert_tensor_parallel_size(layout),
        "expert_model_parallel_size": layout.expert_model_parallel_size,
    }
    for sizes, what in ((dense | pp, "ranks per replica"), (experts | pp, "ranks per set of experts")):
        ranks = math.prod(sizes.values())
        if world_size % ranks:
            beside = f" beside the other model's {others}" if others else ""
            raise UserError(
                f"{world_size} process(es){beside} cannot hold {_product(sizes, role)} = {ranks} {what}; start a "
                f"multiple of {ranks} processes{beside} (torchrun --nproc-per-node) or choose sizes whose product is "
                f"one of {divisors(world_size)}"
            )
    replica, shared = math.prod(dense.values()), math.prod(experts.values())
    if max(replica, shared) % min(replica, shared):
        raise UserError(
            f"{_product(experts, role)} = {shared} must divide {_product(dense, role)} = {replica}, or be a multiple "
            "of it: experts are shared by ranks of one replica, or by whole replicas"
        )


def _product(sizes: dict[str, int], role: str | None) -> str:
    prefix = f"{role}." if role else ""
    return " x ".join(f"{prefix}{name}={size}" for name, size in sizes.items())
