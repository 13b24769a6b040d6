"""A plan's memory against what real runs hold on a CPU, phase by phase and rank by rank, within 10 %."""

import gc
import json

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import write_model

from megatron_tropd.models.build import load_hf_config
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import stage_memory
from megatron_tropd.recipe import load_recipe

# Counts of which the least is taken: gloo's threads free their copies late on a busy machine, which adds to a peak.
UPDATES = 6
PROMPT, RESPONSE = 21, 11  # tokens: every sequence is as long as the plan takes it to be
TP, PP, CP = (f"{size}_parallel_size=2" for size in ("tensor_model", "pipeline_model", "context"))


def both(*keys):
    return [f"{role}.{key}" for role in ("student", "teacher") for key in keys]


LAYOUTS = {  # name -> (processes, dtype, overrides)
    "single": (1, "float32", []),
    "single_recompute": (1, "bfloat16", ["student.recompute=full", "student.dtype=bfloat16"]),
    "tp2_sp": (2, "bfloat16", both(TP, "sequence_parallel=true")),
    "pp2": (2, "float32", both(PP)),
    "pp2_interleaved": (2, "bfloat16", both(PP, "virtual_pipeline_model_parallel_size=2")),
    "dp2": (2, "bfloat16", []),
    "cp2": (2, "float32", both(CP)),
    "dp2_teacher_tp2_offloaded": (2, "bfloat16", [f"teacher.{TP}", "teacher.offload=true"]),
    "jsd_tp2_teacher_dp2": (2, "bfloat16", [f"student.{TP}", "objective.name=jsd"]),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Models large enough to outweigh what a process holds anyway, and prompts of one length."""
    folder = tmp_path_factory.mktemp("material")
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2}
    write_model(folder / "student", "llama", hidden_size=256, intermediate_size=704, **sizes)
    write_model(folder / "teacher", "llama", seed=2, hidden_size=512, intermediate_size=1408, **sizes)
    prompts = [{"text": f"{i:0{PROMPT - 1}d}"} for i in range(16)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return folder


def resident() -> int:
    """Return the bytes of all tensors that there are."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peaks_rank(recipe) -> dict[str, int]:
    """Run two steps; return the most bytes of each phase of the second, when everything has its state."""
    from megatron_tropd.parallel.batching import pad_rollouts
    from megatron_tropd.parallel.groups import initialize
    from megatron_tropd.training.run import set_up
    from megatron_tropd.training.step import train_step

    run, found = set_up(recipe, initialize(recipe.student)), {}
    sizes = (recipe.training.micro_batch_size, None)
    multiples = {"pad_multiple": run.pad_multiple, "row_multiple": run.row_multiple, "pad_id": run.tokenizer.pad_id}
    for step in range(2):
        prompts = run.draw(recipe.training.prompts_per_step)
        written = (prompts, run.guidance.prefixes(prompts, step), run.sampling(step))
        call = measured if step else plainly
        rollouts = call(found, "rollout", run.engine.generate, *written)
        batch = pad_rollouts(rollouts, **multiples)
        scores = call(found, "teacher scores", run.teacher.score, batch, *sizes)
        work = (batch, scores, run.objective, recipe.objective, step, *sizes)
        for _ in range(UPDATES if step else 1):
            call(found, "update", train_step, run.student, *work)
        scores = work = None
    assert batch.tokens.size(1) == PROMPT + RESPONSE
    return found


def plainly(found, phase, function, *arguments):
    """Call a function."""
    return function(*arguments)


def measured(found, phase, function, *arguments):
    """Call a function; note what there was before and the most that came to it."""
    from megatron_tropd.kernels.benchmarks.measure import peak_on_cpu

    results, before = [], resident()
    peak = before + peak_on_cpu(lambda: results.append(function(*arguments)))
    found[phase] = min(found.get(phase, peak), peak)
    return results[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_phase_of_a_real_step_takes_what_was_planned(name, material, tmp_path):
    processes, dtype, layout = LAYOUTS[name]
    recipe = load_recipe(
        None,
        [
            *(f"{role}.hf_path={material / role}" for role in ("student", "teacher")),
            *(f"data.prompts={material / 'prompts.jsonl'}", f"logging.dir={tmp_path}", *both(f"dtype={dtype}")),
            *("objective.name=fkl_outlier", "objective.topk=16", "guidance.schedule=none"),
            *(f"rollout.max_new_tokens={RESPONSE}", "rollout.samples_per_prompt=2", "training.micro_batch_size=4"),
            *("training.prompts_per_step=4", *layout),
        ],
    )
    configs = [load_hf_config(material / role) for role in ("student", "teacher")]
    job = Job(*configs, recipe, gpus=processes, prompt_tokens=PROMPT, fused=False)
    for rank, found in enumerate(run_distributed(peaks_rank, processes, recipe)):
        sizes = {role: getattr(recipe, role).pipeline_model_parallel_size for role in ("student", "teacher")}
        memory = stage_memory(job, "", {role: rank * size // processes for role, size in sizes.items()})
        planned = memory.phases
        planned["update"] = max(planned["update"], planned.pop("optimizer step"))
        if recipe.teacher.offload:  # here the host's memory is the device's
            planned = {phase: size + memory.parts["teacher weights"] for phase, size in planned.items()}
        assert found == pytest.approx(planned, rel=0.1), (rank, {p: planned[p] / found[p] for p in found})
