"""TrOPD steps of a random pair of Llama-3.1-8B's shape cut to four layers: seconds and memory of each phase.

What `plan` says of the same job stands beside both. The run is ended once it has the steps: its checkpoint would take
longer than all of them.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from gpu.models import make_pair
from gpu.stage import Stage, open_stage
from gpu.training import follow

PHASES = {"rollout": "rollout", "teacher scores": "teacher", "update": "update"}  # plan's name: metrics' name
BESIDE_ALLOCATOR = ("CUDA context", "NCCL")  # parts of a plan that no count of tensors holds
STEPS = 20


def main() -> None:
    """Make the models, plan, train, and record both."""
    stage = open_stage()
    started = time.perf_counter()
    pair = make_pair(stage.work / "pair", stage.small, stage.device, getattr(torch, stage.dtype))
    stage.record(seconds_to_make_models=time.perf_counter() - started)
    if stage.device == "cuda":
        torch.cuda.empty_cache()  # the run is another process
    run, steps = stage.work / "eight_b", 3 if stage.small else STEPS
    keys = recipe_keys(stage, pair, run)
    planned = plan(keys, longest_prompt=16 if stage.small else 64)
    stage.record(planned=planned, overrides=keys)
    recipe = stage.work / "eight_b.yaml"
    recipe.write_text("training: {}\n", encoding="utf-8")  # the defaults: everything is in the overrides
    follow(recipe, keys, run, lambda records: tabulate(stage, planned, records), steps)


def recipe_keys(stage: Stage, pair: Path, run: Path) -> list[str]:
    """Return the recipe as overrides of the defaults."""
    response, topk = (12, 16) if stage.small else (128, 64)
    return [
        *(f"{role}.hf_path={pair / role}" for role in ("student", "teacher")),
        *(f"{role}.dtype={stage.dtype}" for role in ("student", "teacher")),
        *(f"data.prompts={pair / 'prompts.jsonl'}", f"logging.dir={run}", "logging.tensorboard=false"),
        *("objective.name=tropd", f"objective.topk={topk}", "guidance.schedule=none"),
        *("rollout.samples_per_prompt=4", f"rollout.max_new_tokens={response}"),
        *("training.prompts_per_step=4", "training.micro_batch_size=4", "training.steps=1000"),
        "checkpoint.save_interval=0",
        *stage.overrides,
    ]


def plan(keys: list[str], longest_prompt: int) -> dict[str, Any]:
    """Return what `plan` predicts of one GPU: GB by phase and by part, of what PyTorch's allocator hands out; seconds.

    The seconds are those of responses of the greatest length, on an H100.
    """
    from megatron_tropd.mcore.layer_specs import uses_transformer_engine
    from megatron_tropd.models.build import load_hf_config
    from megatron_tropd.planning.job import Job
    from megatron_tropd.planning.memory import memory
    from megatron_tropd.planning.seconds import step_seconds
    from megatron_tropd.recipe import load_recipe

    recipe = load_recipe(None, keys)
    configs = [load_hf_config(Path(getattr(recipe, role).hf_path)) for role in ("student", "teacher")]
    job = Job(*configs, recipe, gpus=1, prompt_tokens=longest_prompt, fused=uses_transformer_engine())
    planned = memory(job)
    beside = sum(planned.parts.get(part, 0.0) for part in BESIDE_ALLOCATOR)
    phases = {phase: (size - beside) / 1e9 for phase, size in planned.phases.items()}
    phases["update"] = max(phases["update"], phases.pop("optimizer step"))
    parts = {part: size / 1e9 for part, size in planned.parts.items()}
    return {"memory_gb": phases, "parts_gb": parts, "seconds": step_seconds(job)}


def _is_cost(key: str) -> bool:
    return key == "step" or key.startswith(("seconds_", "memory_", "tokens_per_second", "response_length", "finish_"))


def tabulate(stage: Stage, planned: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Set medians and maxima beside the plan; the first step, which compiles and allocates, stands apart."""
    stage.record(steps=[{k: v for k, v in record.items() if _is_cost(k)} for record in records])
    if len(records) < 2:
        return
    rows = []
    for phase, name in PHASES.items():
        seconds = [record[f"seconds_{name}"] for record in records]
        peaks = [record[f"memory_{name}_gb"] for record in records] if stage.device == "cuda" else [None]
        measured, expected = (None if None in peaks else max(peaks)), planned["memory_gb"][phase]
        ratio = measured / expected if measured else None
        usual = statistics.median(seconds[1:])
        rows.append([phase, seconds[0], usual, planned["seconds"][phase], measured, expected, ratio])
    columns = [
        "phase",
        "first step, s",
        "median step, s",
        "planned s",
        "memory, GB",
        "planned GB",
        "measured / planned",
    ]
    stage.table(f"TrOPD steps of one process in {stage.dtype}", columns, rows)
    lengths = statistics.mean(record["response_length"] for record in records)
    rate = statistics.median(record["tokens_per_second"] for record in records[1:])
    stage.record(mean_response_length=lengths, tokens_per_second=rate)
    note = f"Responses of {lengths:.1f} tokens on average; {rate:.0f} tokens per second over the whole step."
    stage.record(notes=[note, *(["Memory is counted on CUDA alone."] if stage.device == "cpu" else [])])


if __name__ == "__main__":
    main()
