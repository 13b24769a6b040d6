"""Seconds and memory from opening a file of chat prompts to the first step's tokenized prompts; not a test.

    python tests/benchmarks/data_start.py --rows 200000 --tokenizer examples/tiny/student
    python tests/benchmarks/data_start.py --rows 200000 --whole      # every prompt read and tokenized first

Rows are random, the same each time: a system message, 20 to 150 words of the user, a teacher response of 50 to 300.
cpu_s are the process's own seconds, which other work on the machine delays less. Each measurement runs in a fresh
process. RSS counts the pages of mapped files that were touched, which the kernel can drop again; anonymous memory is
what the process holds itself.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEP = 128  # prompts of a step


def make_rows(count: int):
    """Yield the rows."""
    generator = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    for i in range(count):
        user, response = (
            " ".join(generator.choices(words, k=generator.randint(*span))) for span in ((20, 150), (50, 300))
        )
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": user}]
        yield {"id": f"row-{i}", "messages": messages, "teacher_response": response, "source": "random"}


def write(path: Path, count: int) -> None:
    """Write the rows as Parquet, or as JSONL by the name's ending."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(make_rows(count))), path)
    else:
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in make_rows(count))


def memory() -> dict[str, float]:
    """Return this process's resident and anonymous memory in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss") or line.startswith("VmRSS")
    }
    return {"rss": int(fields["VmRSS"]) / 1e3, "anonymous": int(fields["RssAnon"]) / 1e3}


def measure(path: str, tokenizer_path: str, whole: bool) -> None:
    """Print one JSON line with seconds and growth of memory."""
    from megatron_tropd.prompts.source import PromptSource, load_prompts
    from megatron_tropd.tokenizers.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_path)
    tokenizer.encode("warm up")
    before, start, cpu = memory(), time.perf_counter(), time.process_time()
    if whole:
        source = PromptSource(load_prompts(path, tokenizer, 4096))
    else:
        from megatron_tropd.prompts.prompt_set import PromptSet

        prompts = PromptSet(path, tokenizer, max_tokens=4096)
        prompts.problems.raise_if_any()
        source = PromptSource(prompts)
    source.state_dict()
    opened = time.perf_counter() - start
    drawn = source.next(STEP)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    assert len(drawn) == STEP
    assert all(prompt.tokens for prompt in drawn)
    after = memory()
    growth = {f"{name}_mb": round(after[name] - before[name]) for name in before}
    print(
        json.dumps({"opened_s": round(opened, 2), "first_step_s": round(seconds, 2), "cpu_s": round(cpu, 2), **growth})
    )


def main() -> None:
    """Write the file and measure, in separate processes, without and with a warm cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--tokenizer", default="examples/tiny/student")
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet")
    parser.add_argument("--whole", action="store_true", help="load_prompts, which tokenizes all rows")
    parser.add_argument("--file", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file:
        measure(arguments.file, arguments.tokenizer, arguments.whole)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"chat.{arguments.format}"
        write(path, arguments.rows)
        print(f"{arguments.rows} rows, {path.stat().st_size / 1e6:.0f} MB of {arguments.format}", flush=True)
        command = [sys.executable, __file__, "--file", str(path), "--tokenizer", arguments.tokenizer]
        for name in ("first start", "second start"):
            print(f"{name}: ", end="", flush=True)
            subprocess.run([*command, *(["--whole"] if arguments.whole else [])], check=True)


if __name__ == "__main__":
    main()
