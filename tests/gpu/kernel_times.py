"""Time, memory and bandwidth of the kernels beside their baselines, and what the compiled kernels need.

The contestants are those of `python -m megatron_tropd.kernels.benchmarks`: PyTorch, torch.compile, and the peers that
are importable. torch.compile takes long to compile, so it takes part at one vocabulary only. What the compiler tells,
registers and occupancy, stands beside the bandwidth that was reached.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import warnings
from typing import Any

import torch

from gpu.stage import Stage, open_stage

COMPILATION = "megatron_tropd.kernels.benchmarks.compilation"
# Kernels by folder: the operations that spend their time in them.
OPERATIONS = {
    "logprobs": ("log-probs", "fused linear log-probs"),
    "topk": ("top-k forward KL",),
    "full_divergence": ("forward KL", "reverse KL", "jsd", "fused linear JSD"),
}
WARPS_PER_SM = 64


def main() -> None:
    """Measure at one vocabulary, compile, and measure at a larger one; each figure is recorded at once."""
    from megatron_tropd.kernels.benchmarks.measure import copy_bandwidth

    stage = open_stage()
    warnings.filterwarnings("ignore")
    bandwidth = copy_bandwidth(torch.device(stage.device))
    stage.record(copy_gb_per_second=bandwidth / 1e9, times=[])
    tokens, hidden, vocabularies = (64, 32, (512, 640)) if stage.small else (4096, 4096, (128256, 151936))
    sizes = (tokens, hidden, bandwidth)
    measure_vocabulary(stage, vocabularies[0], *sizes, with_compiled=stage.device == "cuda")
    if stage.small or importlib.util.find_spec(COMPILATION) is None:
        stage.record(compiled=None)  # too slow for a test of the script, or not in this version
    else:
        compile_kernels(stage)
    measure_vocabulary(stage, vocabularies[1], *sizes, with_compiled=False)
    failed = [row for row in stage.figures["times"] if row["error"] and row["implementation"].startswith("ours")]
    if failed:
        raise SystemExit(f"{failed[0]['operation']}, {failed[0]['implementation']}: {failed[0]['error']}")


def measure_vocabulary(
    stage: Stage, vocab: int, tokens: int, hidden: int, bandwidth: float, with_compiled: bool
) -> None:
    """Measure every operation at one size."""
    from megatron_tropd.kernels.benchmarks.cases import Material, all_cases

    dtype = getattr(torch, stage.dtype)
    k = 16 if stage.small else 64
    material = Material(tokens, vocab, k, hidden, dtype, torch.device(stage.device))
    for case in all_cases(material, []):
        rows = [time_of(case, contestant, stage, bandwidth, with_compiled) for contestant in case.contestants]
        stage.record(times=[*stage.figures["times"], *rows])
        tabulate_times(stage)
        print(f"{case.operation}, {vocab}: done", flush=True)


def time_of(case: Any, contestant: Any, stage: Stage, bandwidth: float, with_compiled: bool) -> dict[str, Any]:
    """Measure one contestant; what cannot run says why."""
    from megatron_tropd.kernels.benchmarks.measure import measure

    row = {"operation": case.operation, "tokens": case.tokens, "vocab": case.vocab, "implementation": contestant.name}
    row |= dict.fromkeys(("ms", "gb_per_second", "of_copy", "extra_mib", "error"))
    if contestant.call is None or (contestant.name == "torch.compile" and not with_compiled):
        return row
    try:
        found = measure(contestant.call, torch.device(stage.device), 2 if stage.small else 5, contestant.plain)
    except Exception as error:
        return {**row, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"}
    reached = case.floor_bytes / found.seconds
    row |= {"ms": 1e3 * found.seconds, "gb_per_second": reached / 1e9, "of_copy": reached / bandwidth}
    return {**row, "extra_mib": found.extra_bytes / 2**20}


def tabulate_times(stage: Stage) -> None:
    """Show all that was measured; bandwidth counts only the bytes that an operation must move at least."""
    columns = ["operation", "tokens", "vocabulary", "implementation", "ms", "GB/s", "of copy", "extra MiB", "error"]
    rows = [list(row.values()) for row in stage.figures["times"] if row["ms"] or row["error"]]
    title = f"Forward and backward in {stage.dtype}; a copy moves {stage.figures['copy_gb_per_second']:,.0f} GB/s"
    stage.table(title, columns, rows)
    measured = {row["implementation"] for row in stage.figures["times"] if row["ms"] or row["error"]}
    absent = sorted({row["implementation"] for row in stage.figures["times"]} - measured)
    stage.record(notes=[f"Not measured: {', '.join(absent)}."] if absent else [])


def compile_kernels(stage: Stage) -> None:
    """Compile every kernel for this device and set registers and occupancy beside the bandwidth reached."""
    from megatron_tropd.kernels.benchmarks.compilation import compile_all

    major, minor = torch.cuda.get_device_capability() if stage.device == "cuda" else (9, 0)
    compiled = [dataclasses.asdict(r) for r in compile_all([10 * major + minor], workers=max(1, os.cpu_count() - 4))]
    stage.record(compiled=compiled)
    tabulate_compiled(stage)


def tabulate_compiled(stage: Stage) -> None:
    """Show a line per kernel, arguments and dtype: the worst of the examples whose rows are aligned."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for result in stage.figures["compiled"]:
        folder = result["module"].split(".")[-2]
        if result["aligned"] and result["dtype"] == stage.dtype:
            groups.setdefault((folder, result["kernel"], result["arguments"]), []).append(result)
    rows = []
    for (folder, kernel, arguments), results in sorted(groups.items()):
        error = next((result["error"] for result in results if result["error"]), None)
        registers, spilled = (max(result[key] for result in results) for key in ("registers", "spill_bytes"))
        warps = min(result["warps"] * result["ctas_per_sm"] for result in results)
        rows.append(
            [folder, kernel, arguments, registers, spilled, warps / WARPS_PER_SM, reached(stage, folder), error]
        )
    columns = ["folder", "kernel", "arguments", "registers", "spilled bytes", "occupancy", "of copy reached", "error"]
    stage.table("Compiled kernels beside the bandwidth of the operations that they serve", columns, rows)


def reached(stage: Stage, folder: str) -> str:
    """Return what our operations that use a folder's kernels reached, at the first vocabulary."""
    first = stage.figures["times"][0]["vocab"]
    rows = [r for r in stage.figures["times"] if r["implementation"] == "ours" and r["vocab"] == first and r["ms"]]
    return ", ".join(
        f"{r['operation']} {r['of_copy']:.0%}" for r in rows if r["operation"] in OPERATIONS.get(folder, ())
    )


if __name__ == "__main__":
    main()
