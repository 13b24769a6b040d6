"""8-bit matrix products: what reaches Megatron, what is refused, rollouts in the own dtype; on CUDA, numbers."""

import importlib.util

import pytest
import torch
from support.helpers import run_distributed
from support.step_models import load, make_objective
from support.tiny_models import VOCAB_SIZE, write_model

from megatron_tropd.config import ModelConfig, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models import build as model_module
from megatron_tropd.models.build import load_hf_config, transformer_config

needs_transformer_engine = pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
    reason="needs a CUDA device and Transformer Engine",
)
SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "student", "llama", seed=1, **SIZES)
    write_model(folder / "teacher", "llama", seed=2, **SIZES)
    return folder


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_it_is_refused_where_nothing_could_compute_it(role, folder):
    with pytest.raises(UserError, match=rf"{role}.fp8=hybrid needs a CUDA device and Transformer Engine \(pip install"):
        transformer_config(load_hf_config(folder / role), ModelConfig(fp8="hybrid"), role)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
def test_megatron_is_told_format_and_recipe(recipe, folder, monkeypatch):
    monkeypatch.setattr(model_module, "uses_transformer_engine", lambda: True)
    monkeypatch.setattr(model_module, "_device_fields", dict)  # fused kernels are not at stake
    hf_config = load_hf_config(folder / "student")
    config = transformer_config(hf_config, ModelConfig(fp8="hybrid", fp8_recipe=recipe))
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", recipe, False)
    assert not config.disable_parameter_transpose_cache
    assert transformer_config(hf_config, TeacherConfig(fp8="e4m3", offload=True)).disable_parameter_transpose_cache
    assert transformer_config(hf_config, ModelConfig()).fp8 is None


def quantized_rank(path, virtual_size):
    """A model that says fp8, around a rollout; without Transformer Engine Megatron computes nothing in 8 bits."""
    from megatron_tropd.mcore.inference_compat import inference_model
    from megatron_tropd.models.build import build_model
    from megatron_tropd.parallel import groups as parallel

    config = ModelConfig(
        dtype="bfloat16",
        pipeline_model_parallel_size=2 if virtual_size else 1,
        virtual_pipeline_model_parallel_size=virtual_size,
    )
    groups = parallel.initialize(config)
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    chunks = build_model(load_hf_config(path), config, groups, **fp8)
    assert groups.token_multiple(chunks[0].config) == 32

    def said() -> set:
        return {m.config.fp8 for chunk in chunks for m in chunk.modules() if hasattr(m, "config")}

    before = said()
    with inference_model(chunks, groups) as model:
        during = said() | {model.config.fp8}
    with pytest.raises(KeyError), inference_model(chunks, groups):
        raise KeyError
    return before, during, said()


@pytest.mark.parametrize("virtual_size", [None, 2])
def test_rollouts_are_written_in_the_models_own_dtype(virtual_size, folder):
    for found in run_distributed(quantized_rank, 2 if virtual_size else 1, folder / "student", virtual_size):
        assert found == ({"hybrid"}, {None}, {"hybrid"})


def step_rank(folder, fp8):
    """Teacher scores and the student's gradients, in bfloat16 or in 8 bits, on one GPU."""
    from megatron_tropd.config import TrainingConfig
    from megatron_tropd.parallel import groups as parallel
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.training.step import train_step
    from megatron_tropd.training.student import build_student
    from megatron_tropd.types import LOSS_NONE, LOSS_STUDENT, TrainingBatch

    student_config, teacher_config = (
        ModelConfig(hf_path=str(folder / role), fp8=fp8) for role in ("student", "teacher")
    )
    groups = parallel.initialize(student_config)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (4, 64), generator=generator).to(groups.device)
    kind = torch.full((4, 64), LOSS_STUDENT, dtype=torch.int8, device=groups.device)
    kind[:, -1] = LOSS_NONE
    positions = torch.arange(64, device=groups.device).expand(4, 64).contiguous()
    old = torch.full((4, 64), -4.0, device=groups.device)
    batch = TrainingBatch(tokens, tokens.roll(-1, 1), positions, kind, old, torch.arange(4, device=groups.device))
    config, objective = make_objective()
    teacher = TeacherHook(groups, VOCAB_SIZE, topk=objective.topk, temperature=config.temperature)
    scores = teacher.attach(load(teacher_config, groups, training=False)).score(batch, 2)
    training = TrainingConfig(steps=2, lr=0.0, clip_grad=0.0, weight_decay=0.0)
    student = build_student(load(student_config, groups, training=True), training, groups, VOCAB_SIZE)
    train_step(student, batch, scores, objective, config, 5, 2)
    gradients = torch.cat([p.main_grad.flatten() for m in student.modules for p in m.parameters()])
    return scores.logprobs[:, :-1].cpu(), gradients.float().cpu()


@needs_transformer_engine
@pytest.mark.parametrize("fp8", ["e4m3", "hybrid"])
def test_scores_and_gradients_are_near_those_of_bfloat16(fp8, folder):
    ((scores, gradients),) = run_distributed(step_rank, 1, folder, None)
    ((scores_fp8, gradients_fp8),) = run_distributed(step_rank, 1, folder, fp8)
    assert not torch.equal(scores, scores_fp8)
    assert (scores - scores_fp8).abs().mean() < 0.05
    assert torch.cosine_similarity(gradients, gradients_fp8, dim=0) > 0.9
