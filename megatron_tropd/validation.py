"""Contradictions in a recipe: everything that can be refused before a model, a file or a process group is touched.

Types, choices and ranges are checked when a recipe is read (recipe.py); what depends on a model or on data (heads
divisible by TP, prompts, tokenizers, the number of data-parallel ranks) is checked by the stage that reads it.

    validate(recipe)  # raises UserError
"""

from __future__ import annotations

from pathlib import Path

from megatron_tropd.config import ModelConfig, Recipe, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.methods import METHODS, is_guided, trains_on_data


def validate(recipe: Recipe) -> None:
    """Raise UserError at the first missing key or contradiction of a training recipe."""
    _check_required(recipe)
    check_layout("student", recipe.student)
    if not trains_on_data(recipe.objective.name):
        check_layout("teacher", recipe.teacher)
        _check_two_models(recipe)
        _check_sampling(recipe)
    _check_guidance(recipe)
    _check_training(recipe)


def require(recipe: Recipe, *keys: str) -> None:
    """Raise UserError unless each key, or one of its alternatives `a|b`, has a value."""
    for alternatives in keys:
        values = [getattr(getattr(recipe, section), key) for section, key in _split(alternatives)]
        if not any(values):
            first = alternatives.split("|")[0]
            raise UserError(
                f"{alternatives.replace('|', ' or ')} is missing: set it in the recipe or on the command line, "
                f"as in {first}=PATH."
            )


def _split(alternatives: str) -> list[tuple[str, str]]:
    parts = (key.partition(".") for key in alternatives.split("|"))
    return [(section, name) for section, _, name in parts]


def _check_required(recipe: Recipe) -> None:
    require(recipe, "student.hf_path|student.checkpoint")
    if not trains_on_data(recipe.objective.name):
        require(recipe, "teacher.hf_path|teacher.checkpoint")
    require(recipe, "data.prompts", "logging.dir")
    if recipe.evaluation.interval:
        require(recipe, "evaluation.problems|evaluation.held_out")


def check_layout(role: str, model: ModelConfig) -> None:
    """Check one model's parallel layout in itself; `role` is its section's name."""
    if isinstance(model, TeacherConfig):
        _check_ranks(model)
    if model.fp8 and model.dtype not in ("bfloat16", "auto"):  # fp8 needs CUDA, where auto is bfloat16
        raise UserError(
            f"{role}.fp8={model.fp8} contradicts {role}.dtype={model.dtype}: 8-bit matrix products are scaled "
            "from bfloat16. Set the dtype or drop fp8."
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise UserError(
            f"{role}.sequence_parallel=true needs {role}.tensor_model_parallel_size of at least 2, and it is 1: it "
            "shards activations over the tensor-parallel ranks. Raise the one or drop the other."
        )
    if model.virtual_pipeline_model_parallel_size and model.pipeline_model_parallel_size == 1:
        raise UserError(
            f"{role}.virtual_pipeline_model_parallel_size={model.virtual_pipeline_model_parallel_size} needs "
            f"{role}.pipeline_model_parallel_size of at least 2, and it is 1: it interleaves the stages of a pipeline. "
            "Raise the one or remove the other."
        )


def _check_ranks(model: TeacherConfig) -> None:
    if model.ranks == "shared" and model.replicas > 1:
        raise UserError(
            f"teacher.replicas={model.replicas} needs teacher.ranks=dedicated: on shared ranks the number of processes "
            "determines the number of replicas. Set the one or remove the other."
        )
    if model.ranks == "dedicated" and model.offload:
        raise UserError(
            "teacher.offload=true contradicts teacher.ranks=dedicated, where nothing else wants the device. Drop one."
        )


def _check_two_models(recipe: Recipe) -> None:
    student, teacher = recipe.student, recipe.teacher
    own, theirs = (model.checkpoint or model.hf_path for model in (student, teacher))
    assert own is not None  # _check_required has refused a recipe without
    assert theirs is not None
    if Path(own).resolve() == Path(theirs).resolve():
        raise UserError(
            f"teacher and student have the same weights, {theirs}: every loss would be zero. Give the teacher's "
            "own folder in teacher.hf_path or teacher.checkpoint."
        )


def _check_sampling(recipe: Recipe) -> None:
    rollout, objective = recipe.rollout, recipe.objective
    method = METHODS[objective.name]
    by_reward = method.selects == "phases" and "reward" in (objective.exploration_mask, objective.refinement_mask)
    if method.clipped or method.returns or by_reward:  # whatever the importance
        reader, remedy = f"objective.name={objective.name}", "another objective.name"
    elif objective.importance == "off":
        return
    else:
        reader, remedy = f"objective.importance={objective.importance}", "objective.importance=off"
    if rollout.temperature == 0:
        raise UserError(
            f"rollout.temperature=0 (greedy) contradicts {reader}: a greedy policy has no log-probabilities to weigh "
            f"by. Set rollout.temperature=1.0, or {remedy}."
        )
    if rollout.temperature != objective.temperature:
        raise UserError(
            f"rollout.temperature={rollout.temperature} and objective.temperature={objective.temperature} contradict "
            f"{reader}, which compares log-probabilities at one temperature. Make the two equal, or set {remedy}."
        )


def _check_guidance(recipe: Recipe) -> None:
    guidance, name = recipe.guidance, recipe.objective.name
    guided = guidance.schedule != "none"
    if guided and not is_guided(name):
        raise UserError(
            f"guidance.schedule={guidance.schedule} contradicts objective.name={name}, which uses no teacher prefixes. "
            f"Set guidance.schedule=none, or take an objective with guidance: {', '.join(filter(is_guided, METHODS))}."
        )
    if not guided and guidance.responses and name != "seqkd":
        raise UserError(
            f"guidance.responses={guidance.responses} has no use: objective.name={name} with guidance.schedule=none "
            "reads no teacher responses. Drop it, or set a schedule (such as cosine) with a guided objective."
        )


def _check_training(recipe: Recipe) -> None:
    training = recipe.training
    needed = ("use_distributed_optimizer", "overlap_grad_reduce")
    if training.overlap_param_gather and not all(getattr(training, key) for key in needed):
        raise UserError(
            "training.overlap_param_gather=true needs training.use_distributed_optimizer=true, whose shards it "
            "gathers, and training.overlap_grad_reduce=true. Set both or drop it."
        )
    if training.optimizer == "sgd" and training.use_distributed_optimizer:
        raise UserError(
            "training.optimizer=sgd contradicts training.use_distributed_optimizer=true, which shards Adam's state "
            "alone. Set use_distributed_optimizer=false, or optimizer=adam."
        )
    if training.offload_optimizer and recipe.student.dtype == "float32":
        raise UserError(
            "training.offload_optimizer=true contradicts student.dtype=float32, whose parameters are their own main "
            "weights and must stay on the device. Set student.dtype=bfloat16 or drop the key."
        )
    for key in ("adam_beta1", "adam_beta2"):
        if training.optimizer == "adam" and getattr(training, key) >= 1:
            raise UserError(
                f"training.{key}={getattr(training, key)} is not below 1: Adam's bias correction would divide by zero, "
                "and every weight be NaN. Set a value such as its default."
            )
    if training.min_lr is not None and training.min_lr > training.lr:
        raise UserError(
            f"training.min_lr={training.min_lr} is above training.lr={training.lr}, the peak. Lower min_lr or raise lr."
        )
    if training.min_lr and training.lr_schedule == "constant":
        raise UserError(
            f"training.min_lr={training.min_lr} has no use with training.lr_schedule=constant, which never decays. "
            "Drop it, or set lr_schedule=linear or cosine."
        )
    if training.lr_warmup_steps > training.steps:
        raise UserError(
            f"training.lr_warmup_steps={training.lr_warmup_steps} is more than training.steps={training.steps}: the "
            "peak learning rate would never be reached. Lower it."
        )
