"""`megatron-tropd plan`: what fits, what is refused and why, and what is proposed; its numbers of known models."""

import math

import pytest
from transformers import LlamaConfig, MixtralConfig

from megatron_tropd.cli import main
from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models.build import load_hf_config
from megatron_tropd.parallel.layout import check_ranks, model_ranks
from megatron_tropd.planning.accelerator import Accelerator
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import memories, memory
from megatron_tropd.planning.proposals import layouts, proposals
from megatron_tropd.planning.sizes import (
    active_parameters,
    whole_parameters,
)
from megatron_tropd.recipe import load_recipe


def test_a_model_of_experts_is_planned_by_its_size_and_its_active_part():
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    mixtral = MixtralConfig(vocab_size=32000, num_hidden_layers=32, **sizes)
    assert whole_parameters(mixtral).total / 1e9 == pytest.approx(46.7, abs=0.05)  # Mixtral-8x7B
    assert active_parameters(mixtral) / 1e9 == pytest.approx(12.9, abs=0.05)
    recipe = load_recipe(None, ["training.prompts_per_step=64", "rollout.max_new_tokens=1024"])
    found = proposals(Job(mixtral, mixtral, recipe, gpus=8, gpu=Accelerator(memory_gb=141)))
    assert found
    assert any(job.recipe.student.expert_model_parallel_size > 1 for job, *_ in found)


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
    assert "of 79 (80 less 1): fits" in text


def test_auto_is_planned_as_bfloat16(large, capsys):
    texts = []
    for dtype in ("auto", "bfloat16", "float32"):
        keys = [f"{role}.dtype={dtype}" for role in ("student", "teacher")]
        main(["plan", "llama_70b_to_8b", *large, *keys, "--gpus", "8"])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--gpus", "4"], "4 process(es) cannot hold student.tensor_model_parallel_size=8"),
        (["--gpu-memory", "24"], "DOES NOT FIT"),
        (["student.tensor_model_parallel_size=3"], "does not divide all of the model's 32 attention heads"),
        (["training.prompts_per_step=3", "--gpus", "16"], "cannot be split over 2 replicas"),
        (["teacher.ranks=dedicated"], "leaves the student none of 8"),
    ],
)
def test_what_cannot_be_is_an_answer_with_status_1_and_no_error(options, said, large, capsys):
    assert main(["plan", "llama_70b_to_8b", *large, *options]) == 1
    output = capsys.readouterr()
    assert said in output.out
    assert output.err == ""


def test_what_training_refuses_a_plan_refuses_in_the_same_words(tmp_path, capsys):
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 2}
    MixtralConfig(num_hidden_layers=2, num_local_experts=6, vocab_size=128, **sizes).save_pretrained(tmp_path)
    write_config(tmp_path / "teacher", num_hidden_layers=2, **sizes)
    layout = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1}
    keys = [f"student.{key}={size}" for key, size in layout.items()]
    paths = [f"student.hf_path={tmp_path}", f"teacher.hf_path={tmp_path / 'teacher'}"]
    assert main(["plan", *paths, *keys, "student.sequence_parallel=true", "--gpus", "6"]) == 1
    with pytest.raises(UserError) as refused:
        check_ranks(ModelConfig(**layout), 6, "student")
    assert "= 3 must divide" in str(refused.value)
    assert str(refused.value) in capsys.readouterr().out


def test_proposals_are_layouts_that_training_accepts():
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 4}
    nine = MixtralConfig(num_hidden_layers=4, num_local_experts=9, vocab_size=128, **sizes)
    found = list(layouts(nine, ModelConfig(), 6))
    assert any(model.expert_model_parallel_size == 3 for model in found)
    for model in found:
        check_ranks(model, 6)


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


def test_the_cache_is_planned_for_as_many_requests_as_the_engine_makes_room_for(large):
    recipe = load_recipe("llama_70b_to_8b", [*large, "rollout.max_batch_size=50"])
    configs = [load_hf_config(getattr(recipe, role).hf_path) for role in ("student", "teacher")]
    blocks = 56 * math.ceil((512 + 8096) / 256) + 2  # 50 requests are 56 at TP=8; two blocks are Megatron's
    token = 2 * (8 // 8) * 128 * 32 * 2  # keys and values of one head in 32 layers of bfloat16
    assert memory(Job(*configs, recipe, gpus=8)).parts["KV cache"] == blocks * 256 * token


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
    runtime = {"CUDA context", "workspaces", "NCCL"}
    assert student.parts.keys() & teacher.parts.keys() == {"batch and scores"} | runtime
    assert teacher.parts["teacher weights"] == together.parts["teacher weights"]
    assert student.parts["student weights"] == together.parts["student weights"]
    assert student.parts["optimizer"] == 2 * together.parts["optimizer"]  # one replica shards it, not two
    there = teacher.parts["teacher weights"] + sum(teacher.parts[part] for part in runtime)
    assert teacher.phases["rollout"] == pytest.approx(there)
    found = proposals(Job(*configs, apart, gpus=16))
    assert found
    for job, needed, _ in found:
        assert needed.peak <= 79e9
        assert job.gpus_of("student") + job.gpus_of("teacher") == 16
        assert job.gpus_of("teacher") == job.recipe.teacher.replicas * model_ranks(job.recipe.teacher)
    assert main(["plan", "llama_70b_to_8b", *large, "teacher.ranks=dedicated", "--gpus", "16"]) == 0
    assert "the teacher's pipeline stage 0" in capsys.readouterr().out


def test_proposals_fit_and_come_fastest_first(large):
    recipe = load_recipe("llama_70b_to_8b", large)
    student, teacher = (load_hf_config(getattr(recipe, role).hf_path) for role in ("student", "teacher"))
    found = proposals(Job(student, teacher, recipe, gpus=16))
    assert found
    assert [s for *_, s in found] == sorted(s for *_, s in found)
    assert all(needed.peak <= 79e9 for _, needed, _ in found)
    assert any(
        j.recipe.student.tensor_model_parallel_size != j.recipe.teacher.tensor_model_parallel_size for j, *_ in found
    )


def test_where_nothing_fits_as_it_is_host_memory_and_then_context_parallelism_are_tried(large, capsys):
    assert main(["plan", "llama_70b_to_8b", *large, "--gpus", "4"]) == 1
    said = "layouts that fit with teacher.offload=true and training.offload_optimizer=true, the fastest first:"
    assert said in capsys.readouterr().out
    long = ["rollout.max_new_tokens=120000", "training.prompts_per_step=4", "rollout.samples_per_prompt=1"]
    recipe = load_recipe("llama_70b_to_8b", [*large, *long])
    configs = [load_hf_config(getattr(recipe, role).hf_path) for role in ("student", "teacher")]
    bare = dict.fromkeys(("context_gb", "workspaces_gb", "communicator_gb", "graph_gb"), 0.0)
    small = Accelerator(memory_gb=20, reserve_gb=4, **bare)
    found = proposals(Job(*configs, recipe, gpus=32, gpu=small))
    assert found
    for job, needed, _ in found:
        assert needed.peak <= 16e9
        assert job.recipe.student.context_parallel_size == job.recipe.teacher.context_parallel_size == 2
    apart = load_recipe("llama_70b_to_8b", [*large, "teacher.ranks=dedicated"])
    found = proposals(Job(*configs, apart, gpus=16, gpu=Accelerator(memory_gb=48)))
    assert found
    assert not any(job.recipe.teacher.offload for job, *_ in found)  # on dedicated GPUs
    assert main(["plan", "llama_70b_to_8b", *large, "--gpus", "1"]) == 1
    assert "no layout fits 1 GPUs of 80 GB" in capsys.readouterr().out


def test_a_model_without_config_is_named(tmp_path, capsys):
    assert main(["plan", f"student.hf_path={tmp_path}", f"teacher.hf_path={tmp_path}"]) == 2
    assert "config.json" in capsys.readouterr().err
