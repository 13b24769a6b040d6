"""How fast this CPU multiplies matrices in each dtype, with the threads that torch has.

speeds = product_speeds()  # {"float32": 1.1e11, "bfloat16": 4.9e11}
"""

from __future__ import annotations

import time

import torch

_ROWS, _WIDTH = 256, 512  # a micro-batch's tokens, and the width of a small model: 0.13 GFLOP
_SECONDS = 0.05  # for both dtypes together, where the CPU is fast enough for two repetitions
_LEAST, _MOST = 3, 12  # repetitions, of which the first finds the code to run


def product_speeds() -> dict[str, float]:
    """Return the FLOP/s of a product [256, 512] x [512, 512] in float32 and in bfloat16: the best of a few repetitions.

    The speed is measured, and the CPU's flags are not asked: a CPU with bf16 units multiplies slowly in bfloat16 where
    torch's library was built without them or ONEDNN_MAX_CPU_ISA forbids them, and flags have other names on each
    architecture. The repetitions of the two dtypes alternate, so that other work on the machine slows both. About 50 ms
    in all; no random numbers are drawn.
    """
    material = {
        name: (torch.full((_ROWS, _WIDTH), 0.5, dtype=dtype), torch.full((_WIDTH, _WIDTH), 0.5, dtype=dtype))
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    best = dict.fromkeys(material, float("inf"))  # seconds
    begin = time.perf_counter()
    with torch.no_grad():
        for repetition in range(_MOST):
            for name, (rows, weight) in material.items():
                start = time.perf_counter()
                torch.nn.functional.linear(rows, weight)
                best[name] = min(best[name], time.perf_counter() - start)
            if repetition + 1 >= _LEAST and time.perf_counter() - begin > _SECONDS:
                break
    return {name: 2 * _ROWS * _WIDTH * _WIDTH / seconds for name, seconds in best.items()}
