"""Print time, memory and bandwidth of every kernel beside named baselines, all measured in this run.

    python -m megatron_tropd.kernels.benchmarks                                    # CPU: 1,024 tokens x 32,768
    python -m megatron_tropd.kernels.benchmarks --device cuda --tokens 2048 8192 32768 --vocab 32768 128256 151936
    python -m megatron_tropd.kernels.benchmarks --compile-only                     # registers and loads, without a GPU

Baselines that are not installed are named with the reason; `pip install nvidia-modelopt trl liger-kernel` brings them.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import platform
import sys
import warnings

import torch
from tqdm import tqdm

from megatron_tropd.kernels.benchmarks.cases import Case, Material, all_cases
from megatron_tropd.kernels.benchmarks.measure import Measurement, copy_bandwidth, exponent, hardware, measure

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COLUMNS = (
    *("operation", "tokens × vocabulary", "implementation", "ms", "× PyTorch", "extra MiB", "× PyTorch"),
    *("moved / floor", "of copy"),
)


def main() -> None:
    """Measure and print one Markdown table per dtype, or compile and print what the kernels need."""
    args = arguments()
    if args.compile_only:
        sys.exit(print_compiled(args))
    warnings.filterwarnings("ignore")  # of the peers, about what they would rather have installed
    device = torch.device(args.device)
    bandwidth = copy_bandwidth(device)
    about = description(_hardware(device), f"copy bandwidth {bandwidth / 1e9:.1f} GB/s")
    print(f"{about}\n")
    records: list[dict] = []
    for dtype in args.dtype:
        print(f"{dtype}, k = {args.k}, hidden size {args.hidden}\n")
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        times: dict[str, dict[tuple[int, int], float]] = {}
        for vocab, tokens in itertools.product(args.vocab, args.tokens):
            material = Material(tokens, vocab, args.k, args.hidden, DTYPES[dtype], device)
            for case in all_cases(material, args.only):
                rows = run(case, device, args.repeats, bandwidth)
                records += ({"dtype": dtype, **row} for row in rows)
                write_json(args.json, about, records)  # after each, so that an interrupted run leaves what it measured
                milliseconds = next(row["ms"] for row in rows if row["implementation"] == "ours")
                times.setdefault(case.operation, {})[tokens, vocab] = milliseconds or float("nan")
                del case  # its logits, before those of the next are made
        print_exponents(times)


def print_compiled(args: argparse.Namespace) -> int:
    """Compile every Triton kernel, print the table, and return 1 if one does not compile or has no example."""
    from megatron_tropd.kernels.benchmarks import compilation

    results = compilation.compile_all(args.architectures, args.brief)
    about = description("compiled without a GPU")
    print(f"{about}\n")
    print("\n".join(compilation.table(results)))
    write_json(args.json, about, [dataclasses.asdict(result) for result in results])
    problems = [f"{r.module}.{r.kernel}({r.arguments}), {r.example}: {r.error}" for r in results if r.error]
    problems += [f"{name}: no example_launches launches it" for name in compilation.without_example(results)]
    print("\n".join(problems), file=sys.stderr)
    return 1 if problems else 0


def write_json(file: str | None, about: str, rows: list[dict]) -> None:
    """Write command, hardware, versions and date, and the rows; numbers that were not measured are null."""
    if file:
        with open(file, "w", encoding="utf-8") as target:
            json.dump({"about": about, "rows": rows}, target, indent=1)


def run(case: Case, device: torch.device, repeats: int, bandwidth: float) -> list[dict]:
    """Measure a case's contestants, print their rows, and return them."""
    results: dict[str, Measurement | str] = {}
    for contestant in tqdm(case.contestants, desc=f"{case.operation} {case.tokens} x {case.vocab}", leave=False):
        if contestant.call is None:
            results[contestant.name] = ""
            continue
        try:
            # On CUDA ours are Triton kernels, which a count of operators does not see.
            counted = contestant.plain and not (device.type == "cuda" and contestant.name.startswith("ours"))
            results[contestant.name] = measure(contestant.call, device, repeats, counted)
        except Exception as error:  # one contestant's failure must not end the others' run
            first = (str(error).splitlines() or [""])[0]
            results[contestant.name] = f"{type(error).__name__}: {first[:60]}"
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what a failed or greedy contestant leaves must not starve the next
    naive = results["PyTorch"] if isinstance(results["PyTorch"], Measurement) else None
    for name, result in results.items():
        print(row(case, name, result, naive, bandwidth), flush=True)
    return [record(case, name, result, naive, bandwidth) for name, result in results.items()]


def record(case: Case, name: str, result: Measurement | str, naive: Measurement | None, bandwidth: float) -> dict:
    """Return a row for other programs: the table's numbers, null where there is none, and the reason."""
    measured = result if isinstance(result, Measurement) else None
    return {
        "operation": case.operation,
        "tokens": case.tokens,
        "vocabulary": case.vocab,
        "implementation": name,
        "ms": measured and 1e3 * measured.seconds,
        "time_over_pytorch": measured and naive and measured.seconds / naive.seconds,
        "extra_mib": measured and measured.extra_bytes / 2**20,
        "extra_over_pytorch": measured and naive and measured.extra_bytes / naive.extra_bytes,
        "moved_over_floor": measured and measured.moved_bytes and measured.moved_bytes / case.floor_bytes,
        "share_of_copy_bandwidth": measured and case.floor_bytes / measured.seconds / bandwidth,
        "error": result if isinstance(result, str) else None,
    }


def row(case: Case, name: str, result: Measurement | str, naive: Measurement | None, bandwidth: float) -> str:
    """Return a line of the table."""
    where = f"| {case.operation} | {case.tokens:,} × {case.vocab:,} | {name} "
    if isinstance(result, str):
        return f"{where}| {result or '–'} |{' – |' * 5}"
    time_ratio = f"{result.seconds / naive.seconds:.2f}" if naive else "–"
    memory_ratio = f"{result.extra_bytes / naive.extra_bytes:.2f}" if naive else "–"
    moved = f"{result.moved_bytes / case.floor_bytes:.1f}" if result.moved_bytes else "–"
    share = case.floor_bytes / result.seconds / bandwidth
    numbers = f"| {1e3 * result.seconds:.1f} | {time_ratio} | {result.extra_bytes / 2**20:.0f} | {memory_ratio} "
    return f"{where}{numbers}| {moved} | {share:.0%} |"


def print_exponents(times: dict[str, dict[tuple[int, int], float]]) -> None:
    """Fit and print how our time grows with tokens and with the vocabulary, where there are two sizes or more."""
    for operation, by_size in times.items():
        for axis, name in enumerate(("tokens", "vocabulary")):
            other = max(size[1 - axis] for size in by_size)
            line = sorted((size[axis], s) for size, s in by_size.items() if size[1 - axis] == other)
            if len(line) > 1:
                power = exponent([n for n, _ in line], [s for _, s in line])
                print(f"\n{operation}: time ~ {name}^{power:.2f}", end="")
    print("\n")


def description(*facts: str) -> str:
    """Return command, `facts`, versions and date."""
    versions = []
    for package in ("torch", "triton", "megatron-core", "nvidia-modelopt", "trl", "liger-kernel"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} –")
    command = f"`python -m megatron_tropd.kernels.benchmarks {' '.join(sys.argv[1:])}`"
    return (
        f"{command}\n\n{'; '.join(facts)}; Python {platform.python_version()}, "
        f"{', '.join(versions)}; {datetime.date.today()}"
    )


def _hardware(device: torch.device) -> str:
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} thread(s)"
    return f"{hardware(device)}{threads}"


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"], help="of the logits (default: %(default)s)")
    add("--tokens", nargs="+", type=int, default=[1024], help="tokens per call (default: %(default)s)")
    add("--vocab", nargs="+", type=int, default=[32768], help="vocabulary sizes (default: %(default)s)")
    add("--k", type=int, default=64, help="of the top-k; log-probs are read at 1 + k ids (default: %(default)s)")
    add("--hidden", type=int, default=512, help="hidden size of the fused linear operations (default: %(default)s)")
    add("--repeats", type=int, default=5, help="timed calls, of which the median counts (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the rows there, for other programs")
    add("--compile-only", action="store_true", help="only compile the Triton kernels; needs no GPU")
    add("--architectures", nargs="+", type=int, default=[80, 90, 100], help="to compile for (default: %(default)s)")
    add("--brief", action="store_true", help="compile half of the combinations of dtype, mask and padding")
    add("--only", nargs="+", default=[], help="names of operations, e.g. log-probs 'forward KL' (default: all)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
