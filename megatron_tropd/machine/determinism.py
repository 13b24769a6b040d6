"""`training.deterministic`: makes a GPU compute the same bits in a repeated run, at a cost in speed.

The same machines, layout and versions are assumed: other layouts add in another order. Megatron's part is the field
`deterministic_mode` of the student's configuration.
"""

from __future__ import annotations

import os

import torch

from megatron_tropd.errors import UserError

_ALLOWED = {  # variable -> values that give reproducible bits, the first is set where there is none
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),  # Transformer Engine: no attention whose backward pass uses atomics
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring", "Tree", "CollnetDirect", "CollnetChain", "^NVLS"),  # else chosen by timing and hardware
}


def make_deterministic() -> None:
    """Set the environment and torch to reproducible algorithms, before CUDA, cuBLAS and NCCL read their variables.

    Raises:
        UserError: the environment asks for something else, or CUDA has started and a variable is not set.
    """
    for name, allowed in _ALLOWED.items():
        value = os.environ.get(name)
        if value is not None and value not in allowed:
            raise UserError(
                f"training.deterministic=true and the environment's {name}={value} contradict each other; expected "
                f"{' or '.join(allowed)}. Unset the variable."
            )
        if value is None and torch.cuda.is_initialized():
            raise UserError(
                f"training.deterministic=true needs {name}={allowed[0]} in the environment before CUDA starts, but "
                "CUDA has started already; set the variable before the process begins."
            )
        os.environ[name] = value or allowed[0]
    # Caches are large. (torch gives its module this attribute by a class of it, which type checkers do not see.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)  # CUDA has no reproducible cumsum: sampling needs one
