"""Compiles every Triton kernel of the project as its launches would, without a GPU, and reads the machine code.

Kernels are found by walking the source, not from a list; compile_examples.py says how one declares its cases. What is
not shown: time. Kernels are compiled by separate worker processes, since a process imports Triton either with its
interpreter or with its compiler.
"""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.kernels import compile_examples

KERNELS = Path(compile_examples.__file__).parent
_PACKAGE = "megatron_tropd.kernels"


@dataclass(frozen=True)
class Compiled:
    """One kernel with one set of compile-time arguments, for one example and architecture."""

    module: str
    kernel: str
    arguments: str  # compile-time ones, e.g. block=4096
    architecture: int
    example: str
    dtype: str
    masked: bool
    vocab: int
    aligned: bool  # 16 divides the row stride
    narrow_because: str = ""  # why the kernel needs no 16-byte loads
    error: str = ""
    warps: int = 0
    registers: int = 0  # per thread
    spill_bytes: int = 0  # per thread, stack and local memory
    local_instructions: int = 0  # loads and stores of local memory
    shared_bytes: int = 0  # per CTA
    ctas_per_sm: int = 0
    wide_loads: int = 0  # instructions that load 16 bytes per thread
    half_loads: int = 0  # instructions that load 2 bytes per thread
    instructions: int = 0


def find_kernels(root: Path = KERNELS) -> set[tuple[str, str]]:
    """Return (module, name) of every `@triton.jit` function under `root` that no other such function calls.

    Modules are named relative to `root`, e.g. `topk.triton`.
    """
    jitted, called = set(), set()
    for module, tree in _sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and any(_is_jit(d) for d in node.decorator_list):
                jitted.add((module, node.name))
                calls = (call.func for call in ast.walk(node) if isinstance(call, ast.Call))
                called |= {function.id for function in calls if isinstance(function, ast.Name)}
    return {(module, name) for module, name in jitted if name not in called}


def find_examples(root: Path = KERNELS) -> list[str]:
    """Return the modules under `root` that define `example_launches`."""
    return [
        module
        for module, tree in _sources(root)
        if any(isinstance(node, ast.FunctionDef) and node.name == "example_launches" for node in tree.body)
    ]


def _sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(root.rglob("*.py")):
        yield ".".join(path.relative_to(root).with_suffix("").parts), ast.parse(path.read_text(encoding="utf-8"))


def _is_jit(decorator: ast.expr) -> bool:
    """Whether a decorator is triton.jit, with or without arguments."""
    target = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(target) in ("triton.jit", "jit")


def compile_all(architectures: list[int], brief: bool = False, workers: int = 2) -> list[Compiled]:
    """Compile every kernel's examples for compute capabilities such as 90; failures are in the results' `error`.

    Args:
        architectures: compute capabilities.
        brief: fewer combinations; see compile_examples.examples.
        workers: processes that compile.
    """
    os.environ.pop("TRITON_INTERPRET", None)  # the workers inherit the environment
    modules = [f"{_PACKAGE}.{module}" for module in find_examples()]
    tasks = list(itertools.product(modules, compile_examples.examples(brief), architectures))
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        return list(itertools.chain.from_iterable(pool.starmap(compile_module, tasks, chunksize=1)))


def without_example(results: list[Compiled]) -> list[str]:
    """Return the kernels of the project that `results` lack, as `module.name`."""
    compiled = {(r.module.removeprefix(f"{_PACKAGE}."), r.kernel) for r in results}
    return sorted(f"{module}.{name}" for module, name in find_kernels() - compiled)


def compile_module(name: str, example: compile_examples.Example, architecture: int) -> list[Compiled]:
    """Compile what `example_launches(example)` of the module called `name` launches."""
    import triton
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []
    module = importlib.import_module(name)
    describe = functools.partial(
        Compiled,
        architecture=architecture,
        example=example.name,
        dtype=example.dtype_name,
        masked=example.masked,
        vocab=example.vocab,
        aligned=example.aligned,
    )
    launch = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = kernel.signature.bind(*args, **{k: v for k, v in options.items() if k in kernel.arg_names}).arguments
        constants = {p.name: values[p.name] for p in kernel.params if p.is_constexpr}
        arguments = ", ".join(f"{name}={value}" for name, value in constants.items())
        narrow = getattr(module, "NARROW_LOADS", {}).get(kernel.__name__, "")
        of_kernel = functools.partial(
            describe, module=kernel.module, kernel=kernel.__name__, arguments=arguments, narrow_because=narrow
        )
        try:
            binary = launch(kernel, *args, grid=grid, warmup=True, **options)
            compiled.append(of_kernel(**resources(binary.asm["cubin"], binary.metadata, architecture)))
        except Exception as error:  # whatever the compiler raises is the kernel's result
            compiled.append(of_kernel(error=f"{type(error).__name__}: {error}"))

    triton.runtime.driver.set_active(_NoDevice(architecture))
    JITFunction.run = compile_only
    try:
        module.example_launches(example)
    finally:
        JITFunction.run = launch
    return compiled


class _NoDevice:
    """Stands in for Triton's driver where there is no GPU: it names a target, and holds nothing to run on."""

    def __init__(self, architecture: int):
        self.architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # a distinct number, since Triton caches what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(cubin: bytes, metadata: Any, architecture: int) -> dict[str, int]:
    """Return the fields of `Compiled` that machine code tells, given Triton's metadata of the kernel."""
    usage, code = _disassembled(cubin)
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    operations = [m.group(1) for m in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code)]
    shared, warps = metadata.shared, metadata.num_warps
    return {
        "warps": warps,
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        "local_instructions": sum(name.startswith(("LDL", "STL")) for name in operations),
        "shared_bytes": shared,
        "ctas_per_sm": ctas_per_sm(used["REG"], warps, shared, architecture),
        "wide_loads": sum(name.startswith("LDG") and ".128" in name for name in operations),
        "half_loads": sum(name.startswith("LDG") and ".U16" in name for name in operations),
        "instructions": sum(name != "NOP" for name in operations),
    }


@functools.lru_cache(maxsize=64)  # several launches share a kernel
def _disassembled(cubin: bytes) -> tuple[str, str]:
    """Return what cuobjdump says of registers and memory, and the machine code as text."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = [[tool, option, file] for option in ("-res-usage", "-sass")]
        usage, code = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, code


def ctas_per_sm(registers: int, warps: int, shared_bytes: int, architecture: int) -> int:
    """Return how many CTAs of a kernel an SM of sm_80, sm_90 or sm_100 holds at a time (CUDA's occupancy rules).

    Args:
        registers: per thread; handed out per warp in steps of 256, to each quarter of an SM from 16,384.
        warps: per CTA.
        shared_bytes: per CTA; CUDA adds 1 KiB.
        architecture: compute capability, e.g. 90.
    """
    per_warp = 32 * -(-registers // 8) * 8
    by_registers = 4 * (16384 // per_warp) // warps
    shared_of_sm = (164 if architecture < 90 else 228) * 1024
    return min(32, 64 // warps, by_registers, shared_of_sm // (shared_bytes + 1024))


def table(results: list[Compiled]) -> Iterator[str]:
    """Yield the lines of a Markdown table: a line per kernel, compile-time arguments and dtype.

    Cells hold the worst of the examples with aligned rows, for each architecture where these differ.
    """
    architectures = sorted({r.architecture for r in results})
    names = " / ".join(f"sm_{a}" for a in architectures)
    several = "; where a cell holds several numbers, in this order" if len(architectures) > 1 else ""
    titles = ("registers", "spilled bytes", "shared KiB", "CTAs per SM", "16-byte loads", "instructions")
    yield f"For {names}{several}.\n"
    yield f"| kernel | dtype | warps | {' | '.join(titles)} |"
    yield f"|{'---|' * (3 + len(titles))}"

    def key(result: Compiled) -> tuple[str, str]:
        folder = result.module.split(".")[-2]
        return f"{folder} `{result.kernel}` ({result.arguments})", result.dtype

    aligned = (r for r in results if r.aligned)
    for (kernel, dtype), group in itertools.groupby(sorted(aligned, key=key), key):
        rows = list(group)
        per_architecture = [_worst([r for r in rows if r.architecture == a]) for a in architectures]
        columns = zip(*per_architecture, strict=True)
        cells = [column[0] if len(set(column)) == 1 else " / ".join(column) for column in columns]
        yield f"| {kernel} | {dtype} | {rows[0].warps} | {' | '.join(cells)} |"


def _worst(rows: list[Compiled]) -> list[str]:
    """Return a table's cells of one kernel, dtype and architecture."""
    errors = [r.error for r in rows if r.error]
    if errors or not rows:
        return ["error" if errors else "–"] * 6
    return [
        str(max(r.registers for r in rows)),
        str(max(r.spill_bytes for r in rows)),
        f"{max(r.shared_bytes for r in rows) / 1024:.1f}",
        str(min(r.ctas_per_sm for r in rows)),
        str(min(r.wide_loads for r in rows)),
        str(max(r.instructions for r in rows)),
    ]
