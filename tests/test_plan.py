"""The plan against what models really hold: parameters exactly, activations and peaks of a real step within 10 %."""

import copy
import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import run_distributed
from tiny_models import write_model
from transformers import LlamaConfig, MixtralConfig

from megatron_tropd.cli import main
from megatron_tropd.config import ModelConfig
from megatron_tropd.model import load_hf_config
from megatron_tropd.parallel import model_ranks
from megatron_tropd.plan import Accelerator, Job, memories, memory, proposals
from megatron_tropd.plan_model import (
    active_parameters,
    layer_activations,
    stage_layers,
    stage_parameters,
    whole_parameters,
)
from megatron_tropd.recipe import load_recipe

KINDS = ("llama", "llama_tied", "qwen2", "qwen3", "mixtral", "qwen3_moe")
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_model(folder / kind, kind, **SIZES)
    return folder


def layout(tp=1, pp=1, **others) -> ModelConfig:
    return ModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **others)


def parameters_rank(path, model):
    from megatron_tropd import parallel
    from megatron_tropd.model import build_model

    groups = parallel.initialize(model)
    chunks = build_model(load_hf_config(path), model, groups)
    return groups.pp_rank, sum(p.numel() for chunk in chunks for p in chunk.parameters())


LAYOUTS = [layout(), layout(tp=2), layout(pp=2, num_layers_in_first_pipeline_stage=1)]
EXPERT_LAYOUTS = [layout(expert_model_parallel_size=4), layout(tp=2, expert_model_parallel_size=2)]


@pytest.mark.parametrize(
    ("kind", "model"),
    [*itertools.product(KINDS, LAYOUTS), *itertools.product(("mixtral", "qwen3_moe"), EXPERT_LAYOUTS)],
    ids=str,
)
def test_parameters_are_those_of_the_model(kind, model, folder):
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.expert_model_parallel_size
    expected = stage_parameters(load_hf_config(folder / kind), model)
    for stage, count in run_distributed(parameters_rank, ranks, folder / kind, model):
        assert count == expected[stage].total


def test_layers_are_dealt_to_stages_as_megatron_deals_them():
    assert stage_layers(8, layout(pp=4)) == [2, 2, 2, 2]
    assert stage_layers(9, layout(pp=4, num_layers_in_first_pipeline_stage=3)) == [3, 2, 2, 2]
    assert stage_layers(9, layout(pp=2, num_layers_in_last_pipeline_stage=4)) == [5, 4]
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert stage_layers(10, layout(pp=3, **both)) == [3, 4, 3]


def saved_bytes_rank(path, model, length):
    """Bytes that the model's layers keep for the backward pass: of four layers less of two."""
    from megatron_tropd import parallel
    from megatron_tropd.model import build_model

    groups, found = parallel.initialize(model), []
    for layers in (2, 4):
        config = copy.deepcopy(load_hf_config(path))
        config.num_hidden_layers = layers
        (chunk,) = build_model(config, model, groups)
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # a router of memory's leftovers would choose one expert for all
        own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor
            return tensor

        tokens = torch.arange(2 * length).view(2, length) % 131
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk(tokens, torch.arange(length).expand(2, length), None)
        found.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    return found[1] - found[0]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(dtype, recompute, tp, folder):
    model = layout(tp=tp, dtype=dtype, recompute=recompute, sequence_parallel=tp > 1)
    length = 64
    expected = 2 * 2 * length * layer_activations(load_hf_config(folder / "llama"), model, length, False)
    for found in run_distributed(saved_bytes_rank, tp, folder / "llama", model, length):
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [layout(), *EXPERT_LAYOUTS], ids=str)
def test_activations_of_experts_are_what_autograd_keeps(model, dtype, folder):
    model = replace(model, dtype=dtype, sequence_parallel=model.tensor_model_parallel_size > 1)
    ranks, length = model.tensor_model_parallel_size * model.expert_model_parallel_size, 64
    expected = 2 * 2 * length * layer_activations(load_hf_config(folder / "mixtral"), model, length, False, sparse=True)
    # Some experts are chosen more often than others: the mean over all ranks is that of an even choice.
    found = run_distributed(saved_bytes_rank, ranks, folder / "mixtral", model, length)
    assert sum(found) / ranks == pytest.approx(expected, rel=0.1)


def test_a_model_of_experts_is_planned_by_its_size_and_its_active_part():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    mixtral = MixtralConfig(vocab_size=32000, num_hidden_layers=32, **sizes)
    assert whole_parameters(mixtral).total / 1e9 == pytest.approx(46.7, abs=0.05)  # Mixtral-8x7B
    assert active_parameters(mixtral) / 1e9 == pytest.approx(12.9, abs=0.05)
    recipe = load_recipe(None, ["training.prompts_per_step=64", "rollout.max_new_tokens=1024"])
    found = proposals(Job(mixtral, mixtral, recipe, gpus=8), Accelerator(memory_gb=141))
    assert found
    assert any(job.recipe.student.expert_model_parallel_size > 1 for job, *_ in found)


def step_rank(recipe):
    """Peak bytes of a real training step on the CPU: what is resident, and what the step adds."""
    from megatron_tropd import parallel
    from megatron_tropd.convert import load_model_weights
    from megatron_tropd.kernels.benchmarks.measure import peak_on_cpu
    from megatron_tropd.model import build_model
    from megatron_tropd.objectives import build_objective
    from megatron_tropd.train_step import build_student, train_step
    from megatron_tropd.types import LOSS_STUDENT, TeacherScores, TrainingBatch

    groups = parallel.initialize(recipe.student)
    chunks = build_model(load_hf_config(recipe.student.hf_path), recipe.student, groups)
    load_model_weights(chunks, recipe.student, groups)
    student = build_student(chunks, recipe.training, groups, 131)
    objective = build_objective(recipe.objective, recipe.guidance, seed=1)
    rows, length, k = 4, 96, recipe.objective.topk
    tokens = torch.randint(131, (rows, length))
    kind = torch.full((rows, length), LOSS_STUDENT, dtype=torch.int8)
    positions = torch.arange(length).expand(rows, length).contiguous()
    logprobs = torch.full((rows, length), -4.0)
    batch = TrainingBatch(tokens, tokens, positions, kind, logprobs, torch.arange(rows))
    top = torch.randint(131, (rows, length, k)), torch.full((rows, length, k), -4.0)
    scores = TeacherScores(logprobs, *top, logprobs)
    step = partial(train_step, student, batch, scores, objective, recipe.objective, 0, 2)
    step()  # the optimizer makes its state
    peak = peak_on_cpu(step)
    tensors = [p for c in chunks for p in c.parameters()]
    tensors += [p.main_grad for p in tensors]
    for optimizer in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        tensors += [t for state in optimizer.optimizer.state.values() for t in (state["exp_avg"], state["exp_avg_sq"])]
        tensors += [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    given = sum(t.nbytes for t in (tokens, positions, kind, logprobs, *top))
    return sum(storages.values()) + given + peak


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_a_real_step_is_the_plans(dtype, recompute, folder):
    path = folder / "llama"
    overrides = [f"student.hf_path={path}", f"student.dtype={dtype}", f"student.recompute={recompute or 'null'}"]
    overrides += ["training.prompts_per_step=2", "rollout.samples_per_prompt=2", "training.micro_batch_size=2"]
    recipe = load_recipe(None, [*overrides, "rollout.max_new_tokens=32", "objective.topk=8"])
    hf = load_hf_config(path)
    planned = memory(Job(hf, hf, recipe, gpus=1, prompt_tokens=64, fused_attention=False))
    expected = planned.phases["update"] - planned.parts["teacher weights"]
    (found,) = run_distributed(step_rank, 1, recipe)
    assert found == pytest.approx(expected, rel=0.1)


def write_config(path, **sizes):
    LlamaConfig(**{"vocab_size": 128256, "num_key_value_heads": 8, **sizes}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The configs of Llama-3.1-70B and -8B; a plan reads nothing else."""
    root = tmp_path_factory.mktemp("large")
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    slim = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    teacher, student = write_config(root / "teacher", **wide), write_config(root / "student", **slim)
    return [f"teacher.hf_path={teacher}", f"student.hf_path={student}"]


def test_the_shipped_recipe_fits_a_node(large, capsys):
    assert main(["plan", "llama_70b_to_8b", *large, "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "teacher weights        17.641" in text  # 70.56e9 parameters with padding / 8 x 2 bytes
    assert "of 76 (80 less 4): fits" in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "4"], "4 GPUs cannot hold replicas of 8 ranks"),
        (["--gpu-memory", "24"], "DOES NOT FIT"),
        (["student.tensor_model_parallel_size=3"], "does not divide the model's 32 attention heads"),
        (["training.prompts_per_step=3", "--gpus", "16"], "cannot be split over 2 replicas"),
        (["teacher.ranks=dedicated"], "leaves the student none of 8"),
    ],
)
def test_what_cannot_be_is_refused(options, said, large, capsys):
    assert main(["plan", "llama_70b_to_8b", *large, *options]) != 0
    output = capsys.readouterr()
    assert said in output.out + output.err


def test_an_offloaded_optimizer_is_there_only_in_the_update(large):
    kept, offloaded = (
        load_recipe("llama_70b_to_8b", [*large, f"training.offload_optimizer={value}"]) for value in ("false", "true")
    )
    configs = [load_hf_config(getattr(kept, role).hf_path) for role in ("student", "teacher")]
    before, after = (memory(Job(*configs, recipe, gpus=8)) for recipe in (kept, offloaded))
    assert after.phases["update"] == before.phases["update"]
    for phase in ("rollout", "teacher scores"):
        saved = before.parts["student gradients"] + before.parts["optimizer"]
        assert before.phases[phase] - after.phases[phase] == pytest.approx(saved)


def test_a_token_budget_is_planned_like_as_many_padded_tokens(large):
    options = ["training.micro_batch_size=2", f"training.max_tokens_per_micro_batch={2 * (512 + 8096)}"]
    recipes = [load_recipe("llama_70b_to_8b", [*large, "rollout.max_new_tokens=8096", o]) for o in options]
    configs = [load_hf_config(getattr(recipes[0], role).hf_path) for role in ("student", "teacher")]
    padded, packed = (Job(*configs, recipe, gpus=8) for recipe in recipes)
    assert packed.micro_batch_tokens == padded.micro_batch_tokens
    assert memory(packed).parts == memory(padded).parts


def test_weights_in_8_bits_are_copies_beside_the_others(large):
    options = [[], ["teacher.fp8=hybrid", "student.fp8=hybrid"], ["teacher.fp8=hybrid", "teacher.offload=true"]]
    recipes = [load_recipe("llama_70b_to_8b", [*large, *o]) for o in options]
    configs = [load_hf_config(getattr(recipes[0], role).hf_path) for role in ("student", "teacher")]
    plain, quantized, offloaded = (memory(Job(*configs, recipe, gpus=8)).parts for recipe in recipes)
    assert quantized["teacher weights"] == 1.5 * plain["teacher weights"]
    assert quantized["student weights"] == 2 * plain["student weights"]
    assert offloaded["teacher weights"] == plain["teacher weights"]


def test_an_offloaded_teacher_is_there_only_while_it_scores(large):
    kept, offloaded = (
        load_recipe("llama_70b_to_8b", [*large, f"teacher.offload={value}"]) for value in ("false", "true")
    )
    configs = [load_hf_config(getattr(kept, role).hf_path) for role in ("student", "teacher")]
    before, after = (memory(Job(*configs, recipe, gpus=8)) for recipe in (kept, offloaded))
    assert after.phases["teacher scores"] == pytest.approx(before.phases["teacher scores"])
    for phase in ("rollout", "update"):
        assert before.phases[phase] - after.phases[phase] == pytest.approx(before.parts["teacher weights"])


def test_a_teacher_apart_has_gpus_of_its_own(large, capsys):
    shared = load_recipe("llama_70b_to_8b", [*large, "student.tensor_model_parallel_size=4"])
    apart = load_recipe("llama_70b_to_8b", [*large, "student.tensor_model_parallel_size=4", "teacher.ranks=dedicated"])
    configs = [load_hf_config(getattr(shared, role).hf_path) for role in ("student", "teacher")]
    (together,), (student, teacher) = (
        memories(Job(*configs, recipe, gpus=gpus)) for recipe, gpus in ((shared, 4 + 4), (apart, 4 + 8))
    )
    assert student.parts.keys() | teacher.parts.keys() == together.parts.keys()
    assert student.parts.keys() & teacher.parts.keys() == {"batch and scores"}
    assert teacher.parts["teacher weights"] == together.parts["teacher weights"]
    assert student.parts["student weights"] == together.parts["student weights"]
    assert student.parts["optimizer"] == 2 * together.parts["optimizer"]  # one replica shards it, not two
    assert teacher.phases["rollout"] == teacher.parts["teacher weights"]
    found = proposals(Job(*configs, apart, gpus=16), Accelerator())
    assert found
    for job, needed, _ in found:
        assert needed.peak <= 76e9
        assert job.gpus_of("student") + job.gpus_of("teacher") == 16
        assert job.gpus_of("teacher") == job.recipe.teacher.replicas * model_ranks(job.recipe.teacher)
    assert main(["plan", "llama_70b_to_8b", *large, "teacher.ranks=dedicated", "--gpus", "16"]) == 0
    assert "the teacher's pipeline stage 0" in capsys.readouterr().out


def test_proposals_fit_and_come_fastest_first(large):
    recipe = load_recipe("llama_70b_to_8b", large)
    student, teacher = (load_hf_config(getattr(recipe, role).hf_path) for role in ("student", "teacher"))
    gpu = Accelerator()
    found = proposals(Job(student, teacher, recipe, gpus=16), gpu)
    assert found
    assert [s for *_, s in found] == sorted(s for *_, s in found)
    assert all(needed.peak <= 76e9 for _, needed, _ in found)
    assert any(
        j.recipe.student.tensor_model_parallel_size != j.recipe.teacher.tensor_model_parallel_size for j, *_ in found
    )


def test_a_model_without_config_is_named(tmp_path, capsys):
    assert main(["plan", f"student.hf_path={tmp_path}", f"teacher.hf_path={tmp_path}"]) != 0
    assert "config.json" in capsys.readouterr().err
