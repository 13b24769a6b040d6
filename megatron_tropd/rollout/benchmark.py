"""Print what a decode step costs, beside Hugging Face's `generate` and a forward pass alone, all measured in this run.

    python -m megatron_tropd.rollout.benchmark                                     # the shipped student, 64 sequences
    python -m megatron_tropd.rollout.benchmark --model DIR --prompts 32 --prompt-tokens 64 --new-tokens 64
    python -m megatron_tropd.rollout.benchmark --model DIR --prompts 4 --samples 8 --prompt-tokens 256
    torchrun --nproc-per-node 2 -m megatron_tropd.rollout.benchmark --tensor-model-parallel-size 2

A decode step writes one token of each sequence. Its time is that of `--new-tokens` less that of two tokens, per further
token, the median of several runs that take turns: CPU time of this process on a CPU, the clock's on a GPU. No response
ends early. The operations, synchronisations and collectives of a decode step are counted in a separate run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_tropd.config import ModelConfig, RolloutConfig
from megatron_tropd.errors import UserError
from megatron_tropd.kernels.benchmarks.measure import hardware
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.convert import load_model_weights
from megatron_tropd.parallel import groups as parallel
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.rollout.operation_counts import OperationCounts
from megatron_tropd.system.json_files import write_json
from megatron_tropd.system.launcher import launcher_rank
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt, Sampling

_FEW = 2  # new tokens of the run whose time is taken off


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of generating, of one implementation."""

    name: str
    step_seconds: float  # of a further decode step
    tokens_per_second: float | None = None  # of the whole call, prefill included


def main(argv: list[str] | None = None) -> int:
    """Measure and print one Markdown table, and write --json."""
    arguments = _arguments(argv)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    try:
        costs, counts, about = _run(arguments)
        if launcher_rank() == 0:
            print(as_table(costs, counts, about))
            if arguments.json:
                rows = [vars(cost) for cost in costs]
                write_json(arguments.json, {"about": about, "costs": rows, "per decode step": counts})
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        parallel.shutdown()
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny/student", help="Hugging Face folder with weights")
    parser.add_argument("--prompts", type=int, default=64, help="prompts, of random tokens")
    parser.add_argument("--samples", type=int, default=1, help="responses to each prompt")
    parser.add_argument("--prompt-tokens", type=int, default=12)
    parser.add_argument("--new-tokens", type=int, default=27)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--cuda-graphs", default="auto", choices=("auto", "off"))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median is printed")
    parser.add_argument("--json", help="file to write the figures to")
    found = parser.parse_args(argv)
    if min(found.prompts, found.samples, found.prompt_tokens, found.threads, found.repeats) < 1:
        parser.error("--prompts, --samples, --prompt-tokens, --threads and --repeats are at least 1")
    if found.new_tokens <= _FEW:
        parser.error(f"--new-tokens is at least {_FEW + 1}: the first ones are taken off")
    return found


def _run(arguments: argparse.Namespace) -> tuple[list[Cost], dict[str, float], str]:
    tp = arguments.tensor_model_parallel_size
    layout = ModelConfig(hf_path=arguments.model, dtype=arguments.dtype, tensor_model_parallel_size=tp)
    groups = parallel.initialize(layout)
    hf_config = load_hf_config(arguments.model)
    longest = arguments.prompt_tokens + arguments.new_tokens
    if longest > hf_config.max_position_embeddings:
        raise UserError(
            f"--prompt-tokens + --new-tokens is {longest}, beyond the model's context of "
            f"{hf_config.max_position_embeddings}; lower one of them."
        )
    chunks = build_model(hf_config, layout, groups)
    load_model_weights(chunks, layout, groups)
    tokenizer = load_tokenizer(arguments.model)
    config = RolloutConfig(cuda_graphs=arguments.cuda_graphs, max_batch_size=arguments.prompts * arguments.samples)
    engine = RolloutEngine(chunks, tokenizer, groups, config, longest, Endings(frozenset()))
    tokens = random_prompts(arguments.prompts, arguments.prompt_tokens, tokenizer.vocab_size)
    prompts = [Prompt(id=str(i), index=i, tokens=row) for i, row in enumerate(tokens)]

    def ours(new_tokens: int) -> None:
        sampling = Sampling(samples_per_prompt=arguments.samples, max_new_tokens=new_tokens, seed=1)
        engine.generate(prompts, [[] for _ in prompts], sampling)

    runs: dict[str, Callable[[int], None]] = {"this package": ours}
    if tp == 1:
        runs |= _peers(arguments, tokens, groups.device)
    costs = measure(runs, arguments, groups.device)
    return costs, count_operations(ours, arguments.new_tokens), _about(arguments, groups.device)


def random_prompts(number: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return prompts of random token ids, always the same."""
    draw = random.Random(0).randrange
    return [[draw(vocab_size) for _ in range(length)] for _ in range(number)]


def _peers(
    arguments: argparse.Namespace, tokens: list[list[int]], device: torch.device
) -> dict[str, Callable[[int], None]]:
    """Return Hugging Face's generate, and its forward passes over a growing cache, which draw nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    model = model.to(device).eval()
    ids = torch.tensor(tokens, device=device).repeat_interleave(arguments.samples, 0)

    def generate(new_tokens: int) -> None:
        # What the folder's generation_config asks for beside it would be work that the others do not do.
        plain = {"top_k": 0, "top_p": 1.0, "temperature": 1.0, "repetition_penalty": 1.0}
        limits = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0}
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, **plain, **limits)

    @torch.inference_mode()
    def forward(new_tokens: int) -> None:
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        for _ in range(new_tokens - 1):
            model(ids[:, :1], past_key_values=cache, use_cache=True)

    return {"Hugging Face generate": generate, "its forward pass alone": forward}


def measure(runs: dict[str, Callable[[int], None]], arguments: argparse.Namespace, device: torch.device) -> list[Cost]:
    """Return each run's cost; they take turns, so that a slow moment of the machine meets all of them.

    Args:
        runs: name -> function that generates a number of new tokens per sequence.
        arguments: the command line's.
        device: where they run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    whole: dict[str, list[float]] = {name: [] for name in runs}
    for generate in runs.values():
        generate(_FEW)  # what is made once
    for _ in range(arguments.repeats):
        for name, generate in runs.items():
            few, _ = _timed(generate, _FEW, device)
            many, clock = _timed(generate, arguments.new_tokens, device)
            seconds[name].append((many - few) / (arguments.new_tokens - _FEW))
            whole[name].append(clock)
    written = arguments.prompts * arguments.samples * arguments.new_tokens
    return [
        Cost(
            name=name,
            step_seconds=statistics.median(seconds[name]),
            tokens_per_second=None if "forward" in name else written / statistics.median(whole[name]),
        )
        for name in runs
    ]


def _timed(generate: Callable[[int], None], new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a call, of this process's CPU (on a GPU the clock's), and the clock's."""
    on_cuda = device.type == "cuda"
    cpu, clock = time.process_time(), time.perf_counter()
    generate(new_tokens)
    if on_cuda:
        torch.cuda.synchronize()
    cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    return (clock if on_cuda else cpu), clock


def count_operations(generate: Callable[[int], None], new_tokens: int) -> dict[str, float]:
    """Return how many operations of each kind a further decode step takes, on this rank.

    Args:
        generate: writes a number of new tokens per sequence.
        new_tokens: of the longer run.
    """
    found = []
    for number in (_FEW, new_tokens):
        with OperationCounts() as counts:
            generate(number)
        found.append(counts.totals())
    few, many = found
    return {kind: (many[kind] - few[kind]) / (new_tokens - _FEW) for kind in many}


def as_table(costs: list[Cost], counts: dict[str, float], about: str) -> str:
    """Return the figures in Markdown."""
    lines = [about, "", "| | ms per decode step | × the forward pass | tokens/s of the call |", "|---|---|---|---|"]
    floor = next((cost.step_seconds for cost in costs if "forward" in cost.name), None)
    for cost in costs:
        ratio = f"{cost.step_seconds / floor:.2f}" if floor else ""
        rate = f"{cost.tokens_per_second:,.0f}" if cost.tokens_per_second else ""
        lines.append(f"| {cost.name} | {1e3 * cost.step_seconds:.2f} | {ratio} | {rate} |")
    per_step = ", ".join(f"{number:.1f} {kind}" for kind, number in counts.items())
    return "\n".join([*lines, "", f"Per decode step of this package: {per_step}."])


def _about(arguments: argparse.Namespace, device: torch.device) -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "megatron-core", "transformers"))
    clock = "clock" if device.type == "cuda" else "CPU time"
    return (
        f"{arguments.model} in {arguments.dtype}, TP={arguments.tensor_model_parallel_size}: {arguments.prompts} "
        f"prompts of {arguments.prompt_tokens} tokens, {arguments.samples} response(s) to each, {arguments.new_tokens} "
        f"new tokens; {hardware(device)}, {arguments.threads} thread(s); {clock}; {versions}"
    )


if __name__ == "__main__":
    sys.exit(main())
