"""Decoding with and without CUDA graphs, beside the time of reading weights and cache once; and whether memory grows.

The model is the student of `eight_b`. Every setting writes the same responses several times, and the fastest
call counts; a step's time is what long responses take beyond those of one token.
"""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from typing import Any

import torch

from gpu.models import make_pair
from gpu.stage import Stage, open_stage

CALLS = 6


@dataclasses.dataclass(frozen=True)
class Load:
    """How much is generated."""

    batch: int
    tokens: int


def main() -> None:
    """Measure each setting that this version has."""
    from megatron_tropd.config import RolloutConfig
    from megatron_tropd.evaluation.generation import open_model
    from megatron_tropd.kernels.benchmarks.measure import copy_bandwidth
    from megatron_tropd.prompts.source import load_prompts
    from megatron_tropd.recipe import load_recipe

    stage = open_stage()
    pair = make_pair(stage.work / "pair", stage.small, stage.device, getattr(torch, stage.dtype))
    load = Load(batch=4, tokens=32) if stage.small else Load(batch=64, tokens=256)
    keys = [f"student.hf_path={pair / 'student'}", f"student.dtype={stage.dtype}"]
    keys += [f"tokenizer.path={pair / 'plain_tokenizer'}", f"rollout.max_batch_size={load.batch}"]
    with open_model(load_recipe(None, keys), "student") as model:
        prompts = load_prompts(pair / "prompts.jsonl", model.tokenizer)[: load.batch]
        engine = model.engine()
        bandwidth = copy_bandwidth(model.groups.device)
        floor = floor_seconds(engine.chunks, model.hf_config, prompts, load, bandwidth)
        stage.record(copy_gb_per_second=bandwidth / 1e9, floor_ms_per_step=1e3 * floor, **dataclasses.asdict(load))
        has_graphs = "cuda_graphs" in {field.name for field in dataclasses.fields(RolloutConfig)}
        found = {}
        for setting in ("off", "auto") if has_graphs else ("off",):
            changes = {"cuda_graphs": setting} if has_graphs else {}
            found[setting] = measure(with_settings(engine, changes), prompts, load, stage.device)
            tabulate(stage, found, load, floor)
    if not has_graphs:
        stage.note("This version has no rollout.cuda_graphs: `auto` was not measured.")
    check_memory(stage, found)


def with_settings(engine: Any, changes: dict[str, Any]) -> Any:
    """Return an engine over the same weights with other `rollout.*` keys."""
    config = dataclasses.replace(engine.config, **changes)
    return type(engine)(engine.chunks, engine.tokenizer, engine.groups, config, engine.max_sequence_length)


def floor_seconds(chunks: list[Any], hf_config: Any, prompts: list[Any], load: Load, bandwidth: float) -> float:
    """Return the seconds in which a decode step's weights, and the cache at half of the responses, are read once.

    Of the embedding only a batch's rows are read, unless it is the output layer as well.
    """
    named = [(name, p) for chunk in chunks for name, p in chunk.named_parameters()]
    read = [p for name, p in named if hf_config.tie_word_embeddings or "word_embeddings" not in name]
    weights = sum(p.numel() * p.element_size() for p in read)
    config = chunks[0].config
    token = 2 * config.num_query_groups * config.kv_channels * config.num_layers * read[0].element_size()
    length = statistics.mean(len(prompt.tokens) for prompt in prompts) + load.tokens / 2
    return (weights + load.batch * length * token) / bandwidth


def measure(engine: Any, prompts: list[Any], load: Load, device: str) -> dict[str, Any]:
    """Generate; return times, tokens and the memory peak of every call."""
    short = min(generate(engine, prompts, 1, device)[0] for _ in range(3))
    calls = [generate(engine, prompts, load.tokens, device) for _ in range(CALLS)]
    seconds = min(seconds for seconds, _, _ in calls)
    written = [sum(rollouts.lengths) - sum(rollouts.prompt_lengths) for _, _, rollouts in calls]
    return {
        "seconds_first_call": calls[0][0],
        "seconds": seconds,
        "seconds_prefill": short,
        "ms_per_step": 1e3 * (seconds - short) / (load.tokens - 1),
        "tokens": written[-1],
        "tokens_per_second": written[-1] / seconds,
        "peak_gb": [peak for _, peak, _ in calls],
        "responses": calls[-1][2].tokens,
    }


def generate(engine: Any, prompts: list[Any], tokens: int, device: str) -> tuple[float, float, Any]:
    """Return a call's seconds, memory peak in GB (on a CPU the process's so far) and rollouts."""
    from megatron_tropd.types import Sampling

    sampling = Sampling(samples_per_prompt=1, max_new_tokens=tokens, seed=0, step=0)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    rollouts = engine.generate(prompts, [[] for _ in prompts], sampling)
    if device != "cuda":
        return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rollouts
    torch.cuda.synchronize()
    return time.perf_counter() - started, torch.cuda.max_memory_allocated() / 1e9, rollouts


def tabulate(stage: Stage, found: dict[str, dict[str, Any]], load: Load, floor: float) -> None:
    """Record the settings measured so far."""
    columns = ["cuda_graphs", "ms per step", "floor, ms", "× floor", "tokens per second", "prefill, s", "first call, s"]
    columns += ["peak GB, call 2", f"call {CALLS}", "same tokens as off"]
    rows = []
    for setting, result in found.items():
        ms, peaks = result["ms_per_step"], result["peak_gb"]
        times = [ms, 1e3 * floor, ms / (1e3 * floor), result["tokens_per_second"]]
        times += [result["seconds_prefill"], result["seconds_first_call"]]
        same = statistics.mean(
            ours == theirs for ours, theirs in zip(result["responses"], found["off"]["responses"], strict=True)
        )
        rows.append([setting, *times, peaks[1], peaks[-1], f"{same:.0%} of responses"])
    stage.table(f"Decoding {load.batch} responses of {load.tokens} tokens", columns, rows)
    shown = {setting: {k: v for k, v in result.items() if k != "responses"} for setting, result in found.items()}
    stage.record(settings=shown)


def check_memory(stage: Stage, found: dict[str, dict[str, Any]]) -> None:
    """Fail where a call takes more memory than an earlier one: each frees its cache. A CPU's peak never falls."""
    for setting, result in found.items():
        second, last = result["peak_gb"][1], result["peak_gb"][-1]
        if stage.device == "cuda" and last > 1.05 * second:
            raise SystemExit(
                f"cuda_graphs={setting}: the peak grew from {second:.2f} GB to {last:.2f} GB over the calls"
            )


if __name__ == "__main__":
    main()
