"""Scores of the hooked teacher and weight gradients of a training step against float64 transformers models."""

import itertools
from functools import partial

import pytest
import torch
from support.helpers import run_distributed
from support.step_models import layout, load, make_batch, make_objective
from support.tiny_models import VOCAB_SIZE, write_model

# Tensor- and pipeline-parallel sizes, sequence parallelism, and the tokens of a packed micro-batch.
LAYOUTS = {
    "single": (1, 1, False, None),
    "tp2": (2, 1, False, None),
    "pp2": (1, 2, False, None),
    "tp2_sequence_parallel": (2, 1, True, None),
    "tp2_pp2": (2, 2, True, None),
    "packed": (1, 1, False, 1000),
    "tp2_pp2_packed": (2, 2, True, 32),
}
# Objectives over the whole vocabulary: student, name, layout. A tied output layer has two gradients on one stage.
DIVERGENCES = [
    ("tied", "rkl_full", LAYOUTS["single"]),
    ("tied", "jsd", (2, 1, True, 32)),
    ("tied", "fkl_full", LAYOUTS["tp2_pp2"]),
    ("biased", "fkl_full", LAYOUTS["packed"]),
    ("biased", "jsd", LAYOUTS["tp2"]),
    ("biased", "rkl_full", LAYOUTS["tp2_pp2_packed"]),
]
# Objectives on tokens that are selected from the whole batch.
SELECTIONS = [
    ("tied", "entropy_opd", LAYOUTS["single"]),
    ("biased", "reopold", LAYOUTS["tp2"]),
    ("tied", "reopold", LAYOUTS["tp2_pp2_packed"]),
]
# The same and the expert-parallel size: as many replicas, each with the whole batch.
EXPERT_LAYOUTS = {
    "experts": (1, 1, False, None, 1),
    "experts_tp2_ep2": (2, 1, True, None, 2),
    "experts_pp2_ep2_packed": (1, 2, False, 40, 2),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "tied", "llama_tied", seed=1)
    write_model(folder / "biased", "qwen2", seed=3)
    write_model(folder / "experts", "qwen3_moe", seed=4)
    write_model(folder / "teacher", "llama", seed=2, hidden_size=64)
    return folder


def megatron_step(models, student_name, tp, pp, sequence_parallel, max_tokens, ep=1, name="tropd", split=False):
    """One step; returns the teacher's scores (last stage), metrics, and the weight gradients under HF names.

    `split`: two replicas have a half of the batch each.
    """
    from megatron_tropd.config import TrainingConfig
    from megatron_tropd.objective.divergence import Divergence
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.training.step import train_step
    from megatron_tropd.training.student import build_student

    student_config = layout(tp, pp, sequence_parallel, models / student_name, ep)
    teacher_config = layout(tp, pp, sequence_parallel, models / "teacher")
    groups = parallel.initialize(student_config)
    config, objective = make_objective(name)
    options = {"temperature": config.temperature, "with_hidden": objective.divergence is not None}
    teacher = TeacherHook(groups, VOCAB_SIZE, topk=objective.topk, **options)
    teacher.attach(load(teacher_config, groups, training=False))
    before = [p.clone() for c in teacher.chunks for p in c.parameters()]
    training = TrainingConfig(steps=2, lr=0.0, clip_grad=0.0, micro_batch_size=2, weight_decay=0.0)
    training.use_distributed_optimizer = ep == 1 and not split  # whose replicas hold but parts of reduced gradients
    student = build_student(load(student_config, groups, training=True), training, groups, VOCAB_SIZE)
    if objective.divergence:
        weight = teacher.output_weight(student.vocabulary_width)
        settings = {"beta": config.beta, "temperature": config.temperature}
        student.divergence = Divergence(objective.divergence, weight, groups.tp, VOCAB_SIZE, **settings)
    batch = make_batch()
    batch = batch.rows(2 * groups.dp_rank, 2 * groups.dp_rank + 2) if split else batch
    scores = teacher.score(batch, 2, max_tokens)
    result = train_step(student, batch, scores, objective, config, 5, 2, max_tokens)
    assert all(torch.equal(a, b) for a, b in zip(before, (p for c in teacher.chunks for p in c.parameters())))
    assert not any(p.requires_grad or p.grad is not None for c in teacher.chunks for p in c.parameters())
    if scores:
        scores.topk_ids = scores.topk_ids.clone()  # torch.save takes no views of one storage in two dtypes
    return scores, result.metrics, result.grad_norm, gradients(student, groups, student_config.hf_path)


def gradients(student, groups, hf_path) -> dict[str, torch.Tensor]:
    """Gather every parameter's gradient and cut it back into its Hugging Face tensors."""
    from megatron_tropd.models.build import load_hf_config
    from megatron_tropd.models.hf_weights import gather_full, named_parameters, shape_of

    hf_config = load_hf_config(hf_path)
    shape, found = shape_of(hf_config), {}
    for _, parameter, rule in named_parameters(student.modules, hf_config):
        found.update(gather_full(parameter.main_grad, rule, shape, groups))
    return found


def reference_step(models, student_name, name="tropd"):
    """The same in one process, float64, with transformers and autograd."""
    from transformers import AutoModelForCausalLM

    from megatron_tropd.kernels.full_divergence.reference import DEFINITIONS
    from megatron_tropd.types import TeacherScores

    config, objective = make_objective(name)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.float64, attn_implementation="eager")
    teacher, student = load(models / "teacher"), load(models / student_name)
    if student_name == "experts":
        student.set_experts_implementation("eager")  # the only one in float64
    batch = make_batch()
    with torch.no_grad():
        logprobs = (teacher(batch.tokens).logits / config.temperature).log_softmax(-1)
    topk = logprobs.topk(objective.topk, -1)
    divergence = None
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    sampled = logprobs.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    scores = TeacherScores(sampled, topk.indices, topk.values, entropy)
    student_logprobs = (student(batch.tokens).logits / config.temperature).log_softmax(-1)
    if objective.divergence:
        divergence = DEFINITIONS[objective.divergence](student_logprobs, logprobs, config.beta)
    read = student_logprobs.gather(-1, objective.ids(batch, scores))
    student_entropy = -(student_logprobs.exp() * student_logprobs).sum(-1)
    prepared = objective.prepare(batch, scores, 5, student_entropy.detach())
    result = objective.loss(read, prepared, batch, step=5, divergence=divergence)
    loss = result.loss.sum() / batch.num_loss_tokens
    loss.backward()
    return scores, loss.item(), dict(separate_experts({name: p.grad for name, p in student.named_parameters()}))


def separate_experts(gradients):
    """Yield tensors as files name them: transformers holds all experts of a layer in one."""
    for name, gradient in gradients.items():
        layer, fused, kind = name.partition(".experts.")
        if not fused:
            yield name, gradient
            continue
        parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
        for e, expert in enumerate(gradient):
            for part, tensor in zip(parts, expert.chunk(len(parts)), strict=True):
                yield f"{layer}.experts.{e}.{part}.weight", tensor


@pytest.mark.parametrize(
    ("student", "name"),
    [*itertools.product(("tied", "biased"), LAYOUTS), *(("experts", name) for name in EXPERT_LAYOUTS)],
)
def test_scores_loss_and_weight_gradients_equal_float64_autograd(student, name, models):
    compare(models, student, *(LAYOUTS | EXPERT_LAYOUTS)[name])


@pytest.mark.parametrize(("student", "name", "sizes"), DIVERGENCES, ids=str)
def test_divergences_over_the_whole_vocabulary_equal_float64_autograd(student, name, sizes, models):
    compare(models, student, *sizes, name=name)


@pytest.mark.parametrize(("student", "name", "sizes"), SELECTIONS, ids=str)
def test_losses_on_selected_tokens_equal_float64_autograd(student, name, sizes, models):
    compare(models, student, *sizes, name=name)


def test_tokens_are_selected_from_the_batch_of_all_replicas(models):
    _, loss, expected = reference_step(models, "tied", "reopold")
    norm = torch.stack([g.norm() for g in expected.values()]).norm().item()
    results = run_distributed(megatron_step, 2, models, "tied", 1, 1, False, None, 1, "reopold", True)
    shares = {metrics["selected_fraction"] for _, metrics, _, _ in results}
    for _, metrics, grad_norm, gradients in results:
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert grad_norm == pytest.approx(norm, rel=1e-5)
        for tensor, gradient in gradients.items():
            torch.testing.assert_close(gradient.double(), expected[tensor], rtol=1e-4, atol=1e-6)
    assert len(shares) == 1
    assert 0.2 <= shares.pop() < 0.3


def compare(models, student, tp, pp, sequence_parallel, max_tokens, ep=1, name="tropd"):
    """Hold a step under a layout against float64."""
    expected_scores, expected_loss, expected_gradients = reference_step(models, student, name)
    arguments = (models, student, tp, pp, sequence_parallel, max_tokens, ep, name)
    results = run_distributed(megatron_step, tp * pp * ep, *arguments)
    kept = make_batch().loss_kind != 0
    scores, metrics, grad_norm, _ = results[-1]  # the last rank is on the last stage
    for name in ("logprobs", "topk_logprobs", "entropy"):
        ours, theirs = getattr(scores, name)[kept].double(), getattr(expected_scores, name)[kept]
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert torch.equal(scores.topk_ids[kept].long(), expected_scores.topk_ids[kept])
    assert metrics["loss"] == pytest.approx(expected_loss, rel=1e-5, abs=1e-6)  # of terms around 1
    ours = {}
    for *_, found in results:
        ours.update(found)
    if "lm_head.weight" not in expected_gradients:  # tied: every stage that holds the embedding has the whole gradient
        ours.pop("lm_head.weight", None)
    assert ours.keys() == expected_gradients.keys()
    largest = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        error = (ours[name].double() - gradient).abs().max() / largest
        assert error < 1e-5, (name, error)
    norm = torch.stack([g.norm() for g in expected_gradients.values()]).norm().item()
    assert grad_norm == pytest.approx(norm, rel=1e-5)


def test_hook_comes_off_and_refuses_misuse(models):
    run_distributed(misuse_rank, 1, models)


@pytest.mark.parametrize("teacher", [(2, 1), (1, 2)], ids=["same_layout", "other_layout"])
def test_hidden_states_times_the_output_layer_are_the_logits(models, teacher):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models / "teacher", dtype=torch.float64, attn_implementation="eager")
    batch = make_batch()
    with torch.no_grad():
        expected = model(batch.tokens).logits
    kept = batch.loss_kind != 0
    for hidden in run_distributed(hidden_rank, 2, models, teacher):
        logits = hidden.double() @ model.lm_head.weight.double().t()
        torch.testing.assert_close(logits[kept], expected[kept], rtol=1e-5, atol=2e-5)
        assert not hidden[~kept].any()


def hidden_rank(models, teacher):
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.exchange import Exchange
    from megatron_tropd.teacher.hook import TeacherHook

    groups = parallel.initialize(layout(2, 1, False, models / "teacher"))
    config = layout(*teacher, False, models / "teacher")
    others = parallel.build_groups(config, groups)
    exchange = None if others is groups else Exchange(groups, others)
    hook = TeacherHook(others, VOCAB_SIZE, exchange=exchange).attach(load(config, others, training=False))
    return hook.hidden_states(make_batch(), 2)


def test_an_offloaded_teacher_scores_the_same_and_leaves_nothing_on_the_device(models):
    run_distributed(offload_rank, 2, models)


def offload_rank(models):
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.hook import TeacherHook

    config = layout(2, 1, False, models / "teacher")
    groups = parallel.initialize(config)
    chunks = load(config, groups, training=False)
    parameters = [p for chunk in chunks for p in chunk.parameters()]
    before = [p.clone() for p in parameters]
    kept = TeacherHook(groups, VOCAB_SIZE, topk=4).attach(chunks)
    expected = kept.score(make_batch(), 2)
    kept.detach()
    hook = TeacherHook(groups, VOCAB_SIZE, topk=4, offload=True).attach(chunks)
    for _ in range(2):
        assert sum(p.untyped_storage().nbytes() for p in parameters) == 0
        found = hook.score(make_batch(), 2)
        assert torch.equal(found.logprobs, expected.logprobs)
        assert torch.equal(found.topk_ids, expected.topk_ids)
    with hook.weights():
        assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert sum(p.untyped_storage().nbytes() for p in parameters) == 0
    hook.detach()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_gradients_are_freed_between_updates_and_the_updates_are_the_same(models):
    kept, offloaded = (run_distributed(offloaded_optimizer_rank, 2, models, value) for value in (False, True))
    for ours, theirs in zip(offloaded, kept, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def offloaded_optimizer_rank(models, offload: bool):
    """Two updates in bfloat16, distributed optimizer; where offloaded, no gradient may be there outside of them."""
    from megatron_tropd.config import ModelConfig, TrainingConfig
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.training.step import train_step
    from megatron_tropd.training.student import build_student

    model = ModelConfig(hf_path=str(models / "tied"))
    groups = parallel.initialize(model)
    config, objective = make_objective()
    training = TrainingConfig(steps=2, lr=1e-2, offload_optimizer=offload)
    student = build_student(load(model, groups, training=True), training, groups, VOCAB_SIZE)
    student.leave_device()
    before = [p.clone() for p in student.modules[0].parameters()]
    batch = make_batch()
    batch.loss_kind[batch.loss_kind == 1] = 2  # cross-entropy alone: no teacher
    for step in range(2):
        assert freed(student) == offload
        train_step(student, batch, None, sft(), config, step, 2)
    assert freed(student) == offload
    with student.training_state():
        assert not freed(student)
    after = list(student.modules[0].parameters())
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return [p.detach().clone() for p in after]


def sft():
    from megatron_tropd.config import GuidanceConfig, ObjectiveConfig
    from megatron_tropd.objective.objectives import build_objective

    return build_objective(ObjectiveConfig(name="sft"), GuidanceConfig(), seed=7)


def freed(student) -> bool:
    return not sum(p.main_grad.untyped_storage().nbytes() for chunk in student.modules for p in chunk.parameters())


def misuse_rank(models):
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.hook import TeacherHook

    config = layout(1, 1, False, models / "teacher")
    groups = parallel.initialize(config)
    hook = TeacherHook(groups, VOCAB_SIZE, topk=4)
    with pytest.raises(RuntimeError, match="attach"):
        hook.score(make_batch(), 2)
    chunks = load(config, groups, training=False)
    hook.attach(chunks)
    with pytest.raises(RuntimeError, match="detach"):
        hook.attach(chunks)
    tokens = make_batch().tokens
    positions = torch.arange(16).expand(4, 16).contiguous()
    assert chunks[0](tokens, positions, None).shape == (4, 16, 256)  # not armed: whole logits, as without the hook
    assert hook.score(make_batch(), 4).logprobs.shape == (4, 16)
    output_hook, (chunk,) = hook._hook, chunks
    with pytest.raises(ZeroDivisionError), output_hook.replaced(lambda hidden, weight: 1 / 0):
        chunk(tokens, positions, None)
    assert chunk(tokens, positions, None).shape == (4, 16, 256)  # the output layer is its own again
    hook.detach()
    assert not chunks[0].output_layer._forward_hooks


def teacher_and_student(models, student_config, training):
    """Return both, loaded in one layout; the teacher in float32."""
    from dataclasses import replace

    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.training.student import build_student

    groups = parallel.initialize(student_config)
    config, objective = make_objective()
    teacher = TeacherHook(groups, VOCAB_SIZE, topk=objective.topk, temperature=config.temperature)
    teacher_config = replace(student_config, hf_path=str(models / "teacher"), dtype="float32")
    teacher.attach(load(teacher_config, groups, training=False))
    return teacher, build_student(load(student_config, groups, training=True), training, groups, VOCAB_SIZE)


def empty_step_rank(models):
    """A step with momentum, and one none of whose tokens has a loss"""
    from dataclasses import replace

    from megatron_tropd.config import TrainingConfig
    from megatron_tropd.numbers.guard import NumberGuard
    from megatron_tropd.training.step import train_step
    from megatron_tropd.types import LOSS_NONE, Rollouts

    config, objective = make_objective()
    training = TrainingConfig(steps=3, lr=0.01, loss_spike_factor=2.0)
    teacher, student = teacher_and_student(models, layout(1, 2, False, models / "tied"), training)
    state: dict = {}
    guard, batch = NumberGuard(training, state), make_batch()
    found = []
    for kind in (batch.loss_kind, torch.full_like(batch.loss_kind, LOSS_NONE)):
        weights = [p.detach().clone() for p in student.modules[0].parameters()]
        part = replace(batch, loss_kind=kind)
        result = train_step(student, part, teacher.score(part, 2), objective, config, 5, 2)
        guard.observe(0, result, Rollouts([], [], [], [], [], [], []), {})
        moved = any(not torch.equal(a, b) for a, b in zip(weights, student.modules[0].parameters(), strict=True))
        found.append((result.problem, result.metrics["update_skipped"], moved))
    return found, guard.skipped, len(state["losses"])


def test_a_step_without_loss_tokens_leaves_the_student_as_it_was(models):
    for found, skipped, remembered in run_distributed(empty_step_rank, 2, models):
        assert found == [(None, 0.0, True), ("no tokens", 1.0, False)]
        assert (skipped, remembered) == ([], 1)


def float16_rank(models, first_scale):
    """Three steps in float16; `first_scale` is put in the place of the loss scale that training begins with."""
    from dataclasses import replace

    from megatron_tropd.config import TrainingConfig
    from megatron_tropd.training.step import train_step

    config, objective = make_objective()
    student_config = replace(layout(1, 1, False, models / "tied"), dtype="float16")
    teacher, student = teacher_and_student(models, student_config, TrainingConfig(steps=3))
    weights = [p.detach().clone() for p in student.modules[0].parameters()]
    if first_scale:
        student.optimizer.chained_optimizers[0].grad_scaler._scale.fill_(first_scale)
    batch = make_batch()
    results = [train_step(student, batch, teacher.score(batch, 2), objective, config, 5, 2) for _ in range(3)]
    moved = any(not torch.equal(a, b) for a, b in zip(weights, student.modules[0].parameters(), strict=True))
    return [r.metrics["update_skipped"] for r in results], results[0].metrics["loss"], results[-1].grad_norm, moved


def test_float16_passes_over_steps_whose_scaled_gradients_overflow(models):
    ((skipped, loss, grad_norm, moved),) = run_distributed(float16_rank, 1, models, 2.0**16)
    assert skipped[0] == 1.0
    assert skipped[-1] == 0.0
    assert moved
    _, metrics, expected, _ = run_distributed(megatron_step, 1, models, "tied", *LAYOUTS["single"])[0]
    assert loss == pytest.approx(metrics["loss"], rel=0.01)
    assert grad_norm == pytest.approx(expected, rel=0.05)


def test_float16_begins_with_a_loss_scale_that_skips_no_step(models):
    ((skipped, _, _, moved),) = run_distributed(float16_rank, 1, models, None)
    assert skipped == [0.0, 0.0, 0.0]
    assert moved
