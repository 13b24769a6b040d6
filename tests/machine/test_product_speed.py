"""The speeds of both dtypes are those that another measurement finds, with and without the CPU's bf16 units."""

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

from megatron_tropd.machine.product_speed import product_speeds

IS_X86 = platform.machine() in ("x86_64", "AMD64")
# Measures twice, the second time by torch's own timer on square matrices.
SCRIPT = """
import json, torch
from torch.utils.benchmark import Timer
from megatron_tropd.machine.product_speed import product_speeds
torch.set_num_threads(1)
ours = product_speeds()
seconds = {}
for name in ours:
    a = torch.rand(384, 384).to(getattr(torch, name))
    seconds[name] = Timer("a @ a", globals={"a": a}).blocked_autorange(min_run_time=0.1).median
print(json.dumps([ours, {name: 2 * 384**3 / s for name, s in seconds.items()}]))
"""


@pytest.mark.parametrize("most", [None, "AVX2"])
def test_the_faster_dtype_is_that_of_another_measurement(most):
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": most} if most else {})}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ours, theirs = json.loads(done.stdout)
    ratio, other = (speeds["bfloat16"] / speeds["float32"] for speeds in (ours, theirs))
    if not 0.6 < other < 1.7:  # else both are about as fast, and either may be found so
        assert (ratio > 1) == (other > 1), (ours, theirs)
    if most and IS_X86:
        assert ratio < 1, "without AVX-512 no product is in bf16"
    elif not most and torch.cpu.get_capabilities().get("amx_bf16"):
        assert ratio > 1


def test_no_random_number_is_drawn_and_the_result_is_in_operations_per_second():
    state = torch.get_rng_state()
    speeds = product_speeds()
    assert torch.equal(torch.get_rng_state(), state)
    assert set(speeds) == {"float32", "bfloat16"}
    assert all(1e8 < speed < 1e15 for speed in speeds.values())
