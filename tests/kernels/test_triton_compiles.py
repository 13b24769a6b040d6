"""Every Triton kernel compiles for real GPUs, without spilling and with wide loads; no GPU needed, and no interpreter.

The interpreter, in which the other tests run kernels on a CPU, accepts programs that the compiler refuses.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from megatron_tropd.kernels.benchmarks.compilation import ctas_per_sm, find_examples, find_kernels

NOT_COMPILING = """
import triton
import triton.language as tl
@triton.jit
def {name}(out):
    for level in tl.static_range(2):
        shift: tl.constexpr = 8 * level
        tl.store(out + level, shift)
def example_launches(example):
    {name}[(1,)](example.per_row())
"""


def compile_only(folder, *options):
    """Return what `--compile-only --json` writes, and what it prints."""
    file = folder / "compiled.json"
    command = [sys.executable, "-m", "megatron_tropd.kernels.benchmarks", "--compile-only", "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())["rows"], done.stdout


def check(rows):
    """Assert what a GPU needs of every compiled kernel."""
    errors = {f"{r['module']}.{r['kernel']}({r['arguments']}) {r['example']}: {r['error']}" for r in rows if r["error"]}
    assert not errors, "\n".join(sorted(errors))
    for row in rows:
        assert row["registers"] > 0, row
        assert row["instructions"] > 0, row
        assert row["ctas_per_sm"] >= 1, row
        if not row["aligned"]:
            continue  # slow in any case; ptxas may spill a register of sm_80's there to fit one more CTA
        assert row["spill_bytes"] == row["local_instructions"] == 0, row
        if not row["narrow_because"]:
            assert row["wide_loads"] > 0, row
            assert row["half_loads"] == 0, row
    compiled = {(row["module"].removeprefix("megatron_tropd.kernels."), row["kernel"]) for row in rows}
    assert compiled == find_kernels(), "a kernel without example_launches, see kernels/compile_examples.py"
    for kernel in compiled:
        of_kernel = [row for row in rows if row["kernel"] == kernel[1]]
        assert {row["dtype"] for row in of_kernel} == {"bfloat16", "float32"}
        assert {row["masked"] for row in of_kernel} == {True, False}
        assert {row["vocab"] % 16 == 0 for row in of_kernel} == {True, False}


@pytest.mark.timeout(1500)
def test_every_kernel_compiles_for_h100_without_spills_and_with_wide_loads(tmp_path):
    rows, printed = compile_only(tmp_path, "--architectures", "90", "--brief")
    check(rows)
    for _, kernel in find_kernels():
        assert f"`{kernel}`" in printed


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_every_kernel_compiles_for_a100_h100_and_b200_in_all_combinations(tmp_path):
    rows, _ = compile_only(tmp_path, "--architectures", "80", "90", "100")
    check(rows)
    assert {row["architecture"] for row in rows} == {80, 90, 100}


def test_kernels_are_found_by_walking_and_helpers_are_none(tmp_path):
    folder = tmp_path / "new_kernel"
    folder.mkdir()
    source = NOT_COMPILING.format(name="_new_kernel")
    (folder / "triton.py").write_text(source)
    assert find_kernels(tmp_path) == {("new_kernel.triton", "_new_kernel")}
    assert find_examples(tmp_path) == ["new_kernel.triton"]
    (folder / "triton.py").write_text(source.replace("example_launches", "launch"))
    (tmp_path / "helper.py").write_text("@triton.jit\ndef outer(x):\n    _new_kernel(x)\n")
    assert find_kernels(tmp_path) == {("helper", "outer")}
    assert find_examples(tmp_path) == []


@pytest.mark.timeout(900)
def test_a_program_that_only_the_interpreter_accepts_is_reported(tmp_path):
    (tmp_path / "bad_kernel.py").write_text(NOT_COMPILING.format(name="_bad_kernel"))
    program = (
        "from megatron_tropd.kernels.benchmarks.compilation import compile_module\n"
        "from megatron_tropd.kernels.compile_examples import examples\n"
        "print(compile_module('bad_kernel', examples()[0], 90)[0].error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert "CompilationError" in done.stdout
    assert "constexpr cannot be reassigned" in done.stdout


def test_occupancy_by_hand():
    assert ctas_per_sm(registers=32, warps=4, shared_bytes=0, architecture=90) == 16  # 64 warps
    assert ctas_per_sm(registers=128, warps=4, shared_bytes=0, architecture=90) == 4  # 65,536 / (128 * 128)
    assert ctas_per_sm(registers=129, warps=8, shared_bytes=0, architecture=90) == 1  # 136 * 256 fits once
    assert ctas_per_sm(registers=32, warps=4, shared_bytes=100 * 1024, architecture=90) == 2  # 228 KiB
    assert ctas_per_sm(registers=32, warps=4, shared_bytes=100 * 1024, architecture=80) == 1  # 164 KiB
