"""NaN and infinity put into real runs: what is named, on which rank, what is skipped, and what a stop leaves behind."""

import importlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import run_distributed
from support.tiny_models import PAD_ID, write_model
from support.train_runs import APART, PP2, TP2, overrides_of

from megatron_tropd.config import TrainingConfig
from megatron_tropd.errors import UserError
from megatron_tropd.numbers.guard import NumberGuard
from megatron_tropd.numbers.step_report import StepResult
from megatron_tropd.recipe import load_recipe
from megatron_tropd.types import Rollouts

STEPS = ["training.steps=3", "guidance.schedule=none", "rollout.temperature=1"]
MARK = "~"  # in the prompt p3 alone


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A student and a teacher with untied output layers, and prompts of which one holds MARK."""
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "student", "llama", seed=1)
    write_model(folder / "teacher", "llama", seed=2, hidden_size=64)
    write_model(folder / "experts", "mixtral", seed=1)
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(8):
            content = f"add {i}{MARK if i == 3 else ''}"
            line = {"id": f"p{i}", "messages": [{"role": "user", "content": content}], "answer": str(i)}
            file.write(json.dumps({**line, "teacher_response": f"it is {i}"}) + "\n")
    return folder


def mark_id() -> int:
    return 4 + ord(MARK)


def models_of(run, role: str) -> list[torch.nn.Module]:
    return run.student.modules if role == "student" else run.teacher.chunks


def spoil_row(role: str, token: int, run) -> None:
    """Put NaN into a token's embedding, which spoils the sequences that hold it."""
    groups = run.groups if role == "student" else run.teacher.groups
    for module in models_of(run, role):
        if module.pre_process:
            weight = module.embedding.word_embeddings.weight
            start = groups.tp_rank * weight.size(0)
            if start <= token < start + weight.size(0):
                weight.data[token - start] = math.nan


def spoil_gradient(run) -> None:
    """Make one gradient infinite on the first stage, in the first backward pass of each step."""
    module = run.student.modules[0]
    if module.pre_process:
        layer = module.decoder.layers[1]
        layer.mlp.linear_fc1.weight.register_hook(lambda gradient: gradient + math.inf)


def spoil_weight(run) -> None:
    """A weight so large that the activations overflow."""
    for module in run.student.modules:
        if module.post_process:
            module.output_layer.weight.data.fill_(3e38)


def guarded_rank(overrides: list[str], spoil=None) -> tuple[str | None, dict | None]:
    """Train with something spoilt once all is loaded; return what the run ended with, or its summary."""
    module = importlib.import_module("megatron_tropd.training.loop")
    build = module.set_up

    def set_up(*arguments):
        run = build(*arguments)
        if spoil:
            spoil(run)
        return run

    module.set_up = set_up
    try:
        return None, module.train(load_recipe(None, overrides))
    except UserError as error:
        return str(error), None


def run_guarded(material: Path, run: Path, *options: str, ranks: int = 1, spoil=None) -> tuple[str | None, dict | None]:
    overrides = overrides_of(material, run, *STEPS, *options)
    results = run_distributed(guarded_rank, ranks, overrides, spoil)
    errors = {error for error, _ in results}
    assert len(errors) == 1, errors  # once over all ranks: the command line prints rank 0's
    assert "\n" not in (results[0][0] or "")
    return results[0]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


LAYOUTS = {
    "single": (1, []),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, []),
    "packed": (1, ["training.max_tokens_per_micro_batch=64", "rollout.max_new_tokens=8"]),
    "pp2_teacher_tp2": (2, ["student.pipeline_model_parallel_size=2", "teacher.tensor_model_parallel_size=2"]),
    "cp2": (2, [f"{role}.context_parallel_size=2" for role in ("student", "teacher")]),
    "overlap": (2, ["training.overlap_grad_reduce=true", "training.overlap_param_gather=true"]),
    "plain_optimizer_pp2": (2, ["training.use_distributed_optimizer=false", *PP2]),
    "interleaved": (
        2,
        ["student.pipeline_model_parallel_size=2", "student.virtual_pipeline_model_parallel_size=2"],
    ),
}
ALWAYS = ("single", "tp2", "pp2", "dp2")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ALWAYS else pytest.mark.full) for n in LAYOUTS])
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_field_cases_b8_a_token_that_is_nan_names_model_rank_and_sample(role, name, material, tmp_path):
    ranks, options = LAYOUTS[name]
    spoil = partial(spoil_row, role, mark_id())
    error, _ = run_guarded(
        material, tmp_path, *options, "training.prompts_per_step=8", "data.shuffle=false", ranks=ranks, spoil=spoil
    )
    stage = "the teacher's scores" if role == "teacher" else "the student's log-probs as it wrote its responses"
    assert error.startswith(f"step 0: NaN or infinity in {stage}, ")
    # Prompt 3 with two samples per prompt: its samples are 6 and 7, whatever the layout; of row 6, micro-batch 3.
    # The last stage's rank; with context parallelism the one whose share holds the tokens.
    rank = 1 if name == "cp2" or "pp2" in name or name == "interleaved" else 0
    assert f"rank {rank}, micro-batch {'' if name == 'packed' else '3, '}" in error
    for sample in (6, 7):
        assert f"sample {sample} of prompt 'p3'" in error
    assert f"embedding.word_embeddings.weight of the {role} (rank " in error
    assert f"{role}.dtype" in error
    assert "training.on_nan=skip" in error
    assert [(r["update_skipped"], r["nan_steps"]) for r in records(tmp_path)] == [(1.0, 1)]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def fail_first_step(run) -> None:
    """Skip the first step for another reason: a gradient."""
    module = run.student.modules[0]
    done = []

    def spoil(gradient):
        done.append(len(done))
        return gradient + math.nan if len(done) == 1 else gradient

    if module.pre_process:
        module.decoder.layers[0].mlp.linear_fc2.weight.register_hook(spoil)


@pytest.mark.parametrize("name", ["single", "pp2"])
def test_field_cases_b8_skipped_steps_leave_the_student_as_it_was_and_are_counted(name, material, tmp_path):
    ranks, options = LAYOUTS[name]
    options = [*options, "training.on_nan=skip", "data.shuffle=false"]  # p3 is in the first step of two
    spoil = partial(spoil_row, "teacher", mark_id())
    error, summary = run_guarded(material, tmp_path / "a", *options, ranks=ranks, spoil=spoil)
    assert error is None
    lines = records(tmp_path / "a")
    assert lines[0]["update_skipped"] == lines[2]["update_skipped"] == 1
    assert lines[1]["update_skipped"] == 0
    assert [line["nan_steps"] for line in lines] == [1, 1, 2]
    assert summary["skipped_steps"] == [{"step": step, "reason": "teacher scores"} for step in (0, 2)]
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["skipped_steps"] == summary["skipped_steps"]
    state = json.loads((tmp_path / "a/checkpoints/step_000003/state.json").read_text())
    assert state["guard"]["skipped"] == summary["skipped_steps"]
    # What is not skipped is what it would be without the teacher's mistake: nothing of it is left in the optimizer.
    run_guarded(material, tmp_path / "b", *options, "training.steps=2", ranks=ranks)
    assert lines[1]["loss"] != pytest.approx(records(tmp_path / "b")[1]["loss"], rel=1e-6)  # it had one update before
    run_guarded(material, tmp_path / "c", *options, ranks=ranks, spoil=fail_first_step)
    for key in ("loss", "grad_norm", "learning_rate", "response_length"):
        assert lines[1][key] == records(tmp_path / "c")[1][key]


def test_field_cases_b8_more_skips_than_allowed_end_the_run_with_the_list(material, tmp_path):
    options = ["training.on_nan=skip", "training.max_skipped_steps=1", "data.shuffle=false"]
    error, _ = run_guarded(material, tmp_path, *options, spoil=partial(spoil_row, "teacher", mark_id()))
    assert "2 steps were skipped, more than training.max_skipped_steps=1: 0 (teacher scores), 2 (teacher" in error
    assert len(records(tmp_path)) == 3


@pytest.mark.parametrize("name", ["single", "pp2", "dp2", "overlap"])
def test_field_cases_b8_a_gradient_names_its_parameter(name, material, tmp_path):
    ranks, options = LAYOUTS[name]
    error, _ = run_guarded(material, tmp_path, *options, ranks=ranks, spoil=spoil_gradient)
    assert error.startswith("step 0: NaN or infinity in the student's gradient, though the loss is finite: ")
    assert "decoder.layers.1.mlp.linear_fc1.weight (rank 0)" in error
    assert records(tmp_path)[0]["loss"] is not None


def spoil_expert(run) -> None:
    if torch.distributed.get_rank() == 1:
        name, weight = next((n, p) for n, p in run.student.modules[0].named_parameters() if ".experts." in n)
        weight.register_hook(lambda gradient: gradient + math.nan)


def test_field_cases_b8_an_experts_gradient_is_agreed_upon_by_all_ranks(material, tmp_path):
    options = [f"student.hf_path={material / 'experts'}", "student.expert_model_parallel_size=2"]
    error, _ = run_guarded(material, tmp_path, *options, ranks=2, spoil=spoil_expert)
    assert error.startswith("step 0: NaN or infinity in the student's gradient, though the loss is finite: ")
    assert ".mlp.experts." in error
    assert "(rank 1)" in error
    assert "(rank 0)" not in error


def test_field_cases_b8_a_layer_is_numbered_in_the_whole_model(material, tmp_path):
    error, _ = run_guarded(material, tmp_path, *PP2, ranks=2, spoil=check_numbers)
    assert error is None


def check_numbers(run) -> None:
    from megatron_tropd.numbers.finite_weights import named_parameters

    names = [name for name, _ in named_parameters(run.student.modules)]
    numbers = {int(name.split(".")[2]) for name in names if name.startswith("decoder.layers.")}
    assert numbers == ({2, 3} if run.groups.is_last_stage else {0, 1})


@pytest.mark.parametrize("name", ["sft", "tropd"])
def test_field_cases_b8_an_overflow_in_the_forward_pass_names_the_stage(name, material, tmp_path):
    error, _ = run_guarded(material, tmp_path, f"objective.name={name}", spoil=spoil_weight)
    stage = {"sft": "the student's log-probs in training", "tropd": "the student's log-probs as it wrote its responses"}
    assert error.startswith(f"step 0: NaN or infinity in {stage[name]}, ")
    assert "of student are finite." in error or "of student and teacher are finite." in error


def test_field_cases_b8_a_loss_that_overflows_is_told_from_the_models(material, tmp_path):
    options = ["guidance.schedule=constant", "guidance.beta=1e30"]
    error, _ = run_guarded(material, tmp_path, *options)
    assert error.startswith("step 0: NaN or infinity in the loss, though both models' log-probs are finite, ")
    assert "guidance.beta" in error


def test_field_cases_b8_what_padding_spoils_is_found(material, tmp_path):
    options = ["objective.name=sft", "data.shuffle=false"]
    error, _ = run_guarded(material, tmp_path, *options, spoil=partial(spoil_row, "student", PAD_ID))
    # Attention that multiplies a masked NaN by 0 meets it in the forward pass, one that does not in the backward pass.
    assert error.startswith("step 0: NaN or infinity in the student's ")
    assert "embedding.word_embeddings.weight of the student" in error


def test_field_cases_b8_a_dedicated_teacher_is_named_by_the_student(material, tmp_path):
    error, _ = run_guarded(material, tmp_path, *APART, ranks=2, spoil=None)
    assert error is None
    overrides = overrides_of(material, tmp_path / "b", *STEPS, *APART, "data.shuffle=false")
    results = run_distributed(apart_rank, 2, overrides)
    assert results[0] == results[1]
    assert results[0].startswith("step 0: NaN or infinity in the teacher's scores, ")
    assert "of prompt 'p3'" in results[0]


def apart_rank(overrides: list[str]) -> str | None:
    module = importlib.import_module("megatron_tropd.training.loop")
    build = module.build_served_teacher

    def build_spoilt(*arguments):
        hook = build(*arguments)
        hook.chunks[0].embedding.word_embeddings.weight.data[mark_id()] = math.nan
        return hook

    module.build_served_teacher = build_spoilt
    return guarded_rank(overrides)[0]


def spoil_file(source: Path, target: Path, tensor: str, value: float) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    weights[tensor].view(-1)[5] = value
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_field_cases_b8_weights_that_are_nan_are_found_as_they_are_read(role, value, material, tmp_path):
    folder = spoil_file(material / role, tmp_path / "spoilt", "model.layers.2.mlp.down_proj.weight", value)
    error, _ = run_guarded(material, tmp_path / "run", f"{role}.hf_path={folder}", *PP2, ranks=2)
    assert error.startswith(f"NaN or infinity in the {role}'s weights as read in float32 ({role}.hf_path={folder}")
    assert "decoder.layers.2.mlp.linear_fc2.weight on rank 1" in error
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_field_cases_b8_weights_beyond_float16_are_told_from_broken_ones(material, tmp_path):
    folder = spoil_file(material / "teacher", tmp_path / "spoilt", "model.layers.2.mlp.down_proj.weight", 1e5)
    error, _ = run_guarded(material, tmp_path, f"teacher.hf_path={folder}", "teacher.dtype=float16")
    assert "model.layers.2.mlp.down_proj.weight holds numbers up to 1e+05, and float16 ends at 65504" in error
    assert "set dtype=bfloat16 or float32" in error


def test_field_cases_b8_a_dedicated_teachers_weights_are_refused_on_all_ranks(material, tmp_path):
    folder = spoil_file(material / "teacher", tmp_path / "spoilt", "model.norm.weight", math.nan)
    overrides = (f"teacher.hf_path={folder}", "teacher.verify=off", *APART)
    error, _ = run_guarded(material, tmp_path, *overrides, ranks=2)
    assert error.startswith("NaN or infinity in the teacher's weights as read in float32")
    assert "decoder.final_layernorm.weight on rank 0" in error


FLOAT16 = ["student.dtype=float16", "teacher.dtype=float16"]


@pytest.mark.parametrize("name", ["single", "overlap"])
def test_field_cases_b8_an_update_that_breaks_the_weights_writes_no_checkpoint(name, material, tmp_path):
    ranks, options = LAYOUTS[name]
    options = [*options, *FLOAT16, "training.lr=1e6", "training.steps=1"]  # float16 ends at 65504
    error, _ = run_guarded(material, tmp_path, *options, ranks=ranks)
    assert error.startswith("NaN or infinity in the student's weights after step 0: no checkpoint was written")
    assert "training.lr" in error
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def test_field_cases_b8_an_update_that_is_too_large_is_found_in_the_next_step(material, tmp_path):
    error, _ = run_guarded(material, tmp_path, *FLOAT16, "training.lr=1e6")
    assert error.startswith("step 1: NaN or infinity in the student's log-probs as it wrote its responses")
    assert "Weights that are not finite: embedding.word_embeddings.weight of the student (rank 0)" in error
    assert "training.lr" in error


def float16_rank(overrides: list[str], scale: float, spoil=None) -> tuple[str | None, dict | None]:
    importlib.import_module("megatron_tropd.training.student")._FLOAT16_LOSS_SCALE = scale
    return guarded_rank(overrides, spoil)


@pytest.mark.parametrize("options", [TP2, ["training.use_distributed_optimizer=false", *PP2]], ids=["tp2", "pp2_plain"])
def test_field_cases_b4_float16_finds_its_loss_scale_apart_from_nan_and_resumes_with_it(options, material, tmp_path):
    options = [*STEPS, *FLOAT16, "training.steps=8", *options]
    scale = 2.0**14  # too large: gradients overflow until it is halved a few times
    results = run_distributed(float16_rank, 2, overrides_of(material, tmp_path / "a", *options), scale)
    error, summary = results[0]
    assert error is None
    lines = records(tmp_path / "a")
    overflows = [line["overflow_steps"] for line in lines]
    assert overflows[1] > 0
    assert overflows[-1] == sum(line["update_skipped"] for line in lines) < 8
    assert lines[-1]["loss_scale"] < scale
    assert all(math.isfinite(line["loss"]) and line["nan_steps"] == 0 for line in lines)
    assert summary["skipped_steps"] == []
    run_distributed(float16_rank, 2, overrides_of(material, tmp_path / "b", *options, "training.exit_step=2"), scale)
    run_distributed(float16_rank, 2, overrides_of(material, tmp_path / "b", *options), 2.0**10)
    assert [(r["loss"], r["loss_scale"]) for r in records(tmp_path / "b")] == [
        (r["loss"], r["loss_scale"]) for r in lines
    ]


def test_field_cases_b4_what_overflows_at_the_least_scale_is_a_gradient(material, tmp_path):
    overrides = overrides_of(material, tmp_path, *STEPS, *FLOAT16, "training.steps=9")
    ((error, _),) = run_distributed(float16_rank, 1, overrides, 4.0, spoil_gradient)
    assert error.startswith("step 2: NaN or infinity in the student's gradient, though the loss is finite")
    assert "decoder.layers.1.mlp.linear_fc1.weight (rank 0)" in error
    assert [line["overflow_steps"] for line in records(tmp_path)] == [1, 2, 2]


def generate_rank(recipe: list[str], role: str, output: Path, what: str) -> str | None:
    """The command's functions with NaN in a weight after the loading, as a faulty device would make it."""
    from megatron_tropd.evaluation import generation
    from megatron_tropd.evaluation.accuracy import evaluate, load_problems
    from megatron_tropd.evaluation.generation import open_model, write_responses
    from megatron_tropd.prompts.source import load_prompts
    from megatron_tropd.types import Sampling

    loaded = load_recipe(None, recipe)
    load = generation.check_loaded

    def spoil(chunks, *arguments):
        load(chunks, *arguments)
        chunks[0].embedding.word_embeddings.weight.data[mark_id()] = math.nan

    generation.check_loaded = spoil
    with open_model(loaded, role) as model:
        engine = model.engine()
        try:
            if what == "generate":
                prompts = load_prompts(loaded.data.prompts, model.tokenizer, 64)
                write_responses(engine, prompts, Sampling(max_new_tokens=4), model.groups, output, role=role)
            else:
                problems = load_problems(loaded.data.prompts, model.tokenizer, 64)
                rollout = replace(loaded.rollout, max_new_tokens=4)
                evaluate(engine, problems, loaded.evaluation, model.groups, rollout=rollout, role=role)
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize("what", ["generate", "evaluate"])
def test_field_cases_b8_responses_of_nan_logits_are_refused(what, material, tmp_path):
    recipe = overrides_of(material, tmp_path / "run")
    for error in run_distributed(generate_rank, 2, recipe, "teacher", tmp_path / "out.jsonl", what):
        assert error.startswith("NaN or infinity in the teacher's logits as it wrote its responses to prompt ")
        assert "prompt 'p3' (rank 1)" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_field_cases_b8_an_evaluation_of_nan_logits_records_no_accuracy(material, tmp_path):
    options = [f"evaluation.problems={material / 'prompts.jsonl'}", "training.on_nan=skip", "training.steps=1"]
    run_guarded(material, tmp_path, *options, spoil=partial(spoil_row, "student", mark_id()))
    first = json.loads((tmp_path / "evaluations.jsonl").read_text().splitlines()[0])
    assert first == {"step": 0, "evaluation_not_finite": 1.0}  # p3 alone


@pytest.mark.parametrize(("role", "on_nan"), [("teacher", "stop"), ("student", "stop"), ("teacher", "skip")])
def test_field_cases_b8_a_held_out_divergence_names_the_model(role, on_nan, material, tmp_path):
    options = [f"evaluation.held_out={material / 'prompts.jsonl'}", f"training.on_nan={on_nan}", *PP2]
    options += ["training.steps=1", "training.max_skipped_steps=1"]
    error, summary = run_guarded(material, tmp_path, *options, ranks=2, spoil=partial(spoil_row, role, mark_id()))
    if on_nan == "skip":
        assert error is None
        assert summary["evaluations"][0]["held_out_tokens"] > 0
        return
    assert error.startswith("the held-out divergence is NaN or infinite at ")
    assert f"for the {role}'s hidden states" in error
    assert "'p3'" in error
    assert "'p0'" not in error


def guard_with(**options) -> NumberGuard:
    return NumberGuard(TrainingConfig(**options), {})


def observe(guard: NumberGuard, step: int, **fields) -> dict:
    return guard.observe(step, StepResult(**fields), Rollouts([], [], [], [], [], [], []), {})


def test_spikes_are_measured_by_the_median_of_the_window():
    guard = guard_with(loss_spike_factor=3.0, grad_norm_spike_factor=10.0, spike_window=6)
    for step, loss in enumerate((1.0, 2.0, 4.0, 3.0)):
        assert guard.limits().loss == math.inf
        observe(guard, step, loss=loss, grad_norm=0.5)
    observe(guard, 4, loss=5.0, grad_norm=0.5)
    assert guard.limits().loss == 9.0
    assert guard.limits().grad_norm == 5.0
    for step in range(5, 11):
        observe(guard, step, loss=10.0, grad_norm=0.5)
    assert guard.limits().loss == 30.0


def test_without_factors_nothing_is_kept_and_nothing_limited():
    guard = guard_with()
    state = guard._state
    metrics = [observe(guard, step, loss=1.0, grad_norm=1.0) for step in range(9)]
    assert (state["losses"], state["grad_norms"]) == ([], [])
    assert guard.limits().loss == guard.limits().grad_norm == math.inf
    assert metrics[-1] == {"nan_steps": 0}


@pytest.mark.parametrize("kind", ["loss", "grad_norm"])
def test_spikes_are_skipped_counted_and_survive_a_resume(kind, material, tmp_path):
    key = f"training.{'loss' if kind == 'loss' else 'grad_norm'}_spike_factor"
    # The samples of a step differ, and so do its loss and norm: a factor just above 1 takes some steps for spikes.
    options = ["training.spike_window=2", "training.max_skipped_steps=99", "training.lr=0", "training.steps=6"]
    options += [f"{key}=1.001", *TP2]
    error, summary = run_guarded(material, tmp_path / "a", *options, ranks=2)
    assert error is None
    lines = records(tmp_path / "a")
    spikes = [entry["step"] for entry in summary["skipped_steps"]]
    assert spikes
    assert [line["update_skipped"] for line in lines] == [float(line["step"] in spikes) for line in lines]
    assert (lines[-1]["spike_steps"], lines[-1]["nan_steps"]) == (len(spikes), 0)
    run_guarded(material, tmp_path / "b", *options, "training.exit_step=4", ranks=2)
    _, resumed = run_guarded(material, tmp_path / "b", *options, ranks=2)
    assert resumed["skipped_steps"] == summary["skipped_steps"]
    assert [line["loss"] for line in records(tmp_path / "b")] == [line["loss"] for line in lines]


def test_a_state_of_before_the_guard_is_read():
    from megatron_tropd.training.checkpoint import TrainingState

    state = TrainingState(**{"step": 3, "cursor": {}, "layout": {}, "evaluations": []})
    guard = NumberGuard(TrainingConfig(), state.guard)
    assert guard.skipped == []
    assert state.guard["skipped"] == []
