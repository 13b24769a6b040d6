"""Checks what a recipe needs of the machine, before process groups are made and weights are read.

Pure functions of a recipe and an `Environment`; every rank of a node gets the same answer. Contradictions within
a recipe are `validation.py`'s.

    check(recipe, gather())  # raises UserError
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tropd.config import ModelConfig, Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.machine.environment import (
    FLASH_ATTN_CAPABILITY,
    FLASH_ATTN_LEAST,
    REQUIREMENTS,
    Environment,
    misfit,
    remedy,
)
from megatron_tropd.methods import trains_on_data
from megatron_tropd.records.trackers import missing_packages

_TENSOR_CORES = {"bfloat16": (8, 0), "auto": (8, 0)}  # least compute capability of a dtype; auto is bfloat16
_FP8_CAPABILITY = {"tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


def check(recipe: Recipe, environment: Environment, roles: tuple[str, ...] | None = None) -> None:
    """Raise UserError with everything that the machine lacks for a recipe, as one paragraph.

    Args:
        recipe: read and valid in itself.
        environment: this process's.
        roles: the models that will run; default: those that training takes.
    """
    found = problems(recipe, environment, roles)
    if found:
        raise UserError(" ".join(found))


def problems(
    recipe: Recipe, environment: Environment, roles: tuple[str, ...] | None = None, clips: bool = False
) -> list[str]:
    """Return everything that the machine lacks for a recipe, a sentence or two each; see `check`.

    `clips`: a layout of more ranks than there are processes will be clipped to them, as the doctor does.
    """
    trains = roles is None
    if roles is None:
        roles = ("student",) if trains_on_data(recipe.objective.name) else ("student", "teacher")
    found = [*_packages(environment), *_attention(recipe, environment, roles[0])]
    if trains:
        found += [*_kernel(recipe, environment), *missing_packages(recipe)]
    found += _processes(environment)
    for role in roles:
        found += _model(role, getattr(recipe, role), environment, clips)
    return found + list(_static_engine(recipe, environment, roles[0])) + list(_variables(environment))


def fp8_problem(role: str, model: ModelConfig, uses_transformer_engine: bool) -> str | None:
    """Return why a model cannot compute in 8 bits; None where it can, or need not."""
    if model.fp8 is None or uses_transformer_engine:
        return None
    return (
        f"{role}.fp8={model.fp8} needs a CUDA device and Transformer Engine (pip install --no-build-isolation -e "
        "'.[gpu]'); install it or remove the key."
    )


def _packages(environment: Environment) -> Iterator[str]:
    for rule in REQUIREMENTS:
        package = environment.package(rule.name)
        if not rule.required:
            continue
        if not package.importable:
            why = package.problem or "it is not installed"
            yield f"{rule.name} is needed by {rule.user}, and {why}; {rule.remedy}."
        elif (expected := misfit(rule.name, package.version)) is not None:
            yield f"{rule.name} {package.version} does not do for {rule.user}: {expected}; {rule.remedy}."
    engine = environment.package("Transformer Engine")
    if environment.uses_transformer_engine and engine.problem:
        yield (
            f"Transformer Engine {engine.version} is installed and {engine.problem}; install it again with "
            f"{remedy('Transformer Engine', environment)}, or remove it: pip uninstall transformer-engine."
        )


def _attention(recipe: Recipe, environment: Environment, role: str) -> Iterator[str]:
    if recipe.rollout.attention != "flash":
        return
    instead = "or set rollout.attention=auto, which takes torch's own attention where flash-attn cannot run"
    if not environment.has_flash_attention:
        package = environment.package("flash-attn")
        why = package.problem or "it is not installed"
        if package.importable:
            why = f"version {package.version} is installed"
        install = remedy("flash-attn", environment)
        yield f"rollout.attention=flash needs flash-attn {FLASH_ATTN_LEAST} or later, and {why}; {install}, {instead}."
    elif not environment.has_cuda:
        yield f"rollout.attention=flash needs a CUDA device, and there is none; run on one, {instead}."
    elif getattr(recipe, role).dtype == "float32":
        yield (
            f"rollout.attention=flash contradicts {role}.dtype=float32: flash-attn computes in float16 and bfloat16 "
            f"alone; set {role}.dtype=bfloat16, {instead}."
        )
    elif environment.capability is not None and environment.capability < FLASH_ATTN_CAPABILITY:
        yield (
            f"rollout.attention=flash needs GPUs of compute capability 8.0 or later, and a {environment.gpus[0].name} "
            f"has {_dotted(environment.capability)}; use others, {instead}."
        )


def _kernel(recipe: Recipe, environment: Environment) -> Iterator[str]:
    if recipe.objective.kernel != "triton":
        return
    instead = "or set objective.kernel=auto, which takes the chunked kernels where Triton cannot run"
    if not environment.fits("Triton"):
        package = environment.package("Triton")
        why = package.problem or (
            f"version {package.version} is installed" if package.version else "it is not installed"
        )
        install = remedy("Triton", environment)
        yield f"objective.kernel=triton needs Triton 3.2 or later, and {why}; {install}, {instead}."
    elif not environment.has_cuda and environment.variables.get("TRITON_INTERPRET") != "1":
        yield f"objective.kernel=triton needs a CUDA device, and there is none; run on one, {instead}."


def _processes(environment: Environment) -> Iterator[str]:
    gpus, processes = len(environment.gpus), environment.local_world_size
    if environment.has_cuda and processes > gpus:
        yield (
            f"{processes} processes on this node and {_count(gpus, 'GPU')}: each process needs its own GPU; start "
            f"torchrun --nproc-per-node {gpus}, or export CUDA_VISIBLE_DEVICES= to run on the CPU."
        )


def _model(role: str, model: ModelConfig, environment: Environment, clips: bool) -> Iterator[str]:
    fp8 = fp8_problem(role, model, environment.uses_transformer_engine)
    if fp8:
        yield fp8
    if not environment.has_cuda:
        return
    gpus, tp = len(environment.gpus), model.tensor_model_parallel_size
    if tp > gpus and not (clips and tp > environment.world_size):
        sizes = " or ".join(map(str, [size for size in range(1, gpus + 1) if tp % size == 0]))
        yield (
            f"{role}.tensor_model_parallel_size={tp} is more than the {_count(gpus, 'GPU')} of a node, and tensor "
            f"parallelism between nodes waits for their network in every layer; set it to {sizes}, and "
            f"{role}.pipeline_model_parallel_size to spread the model further."
        )
    capability, needed = environment.capability, _FP8_CAPABILITY[model.fp8_recipe]
    assert capability is not None  # there is a CUDA device
    if model.fp8 and not fp8 and capability < needed:
        yield (
            f"{role}.fp8_recipe={model.fp8_recipe} needs GPUs of compute capability {_dotted(needed)} or later, and a "
            f"{environment.gpus[0].name} has {_dotted(capability)}; remove {role}.fp8 or take another fp8_recipe."
        )
    needed = _TENSOR_CORES.get(model.dtype, (0, 0))
    if capability < needed:
        yield (
            f"{role}.dtype={model.dtype} needs GPUs of compute capability {_dotted(needed)} or later, and a "
            f"{environment.gpus[0].name} has {_dotted(capability)}; set {role}.dtype=float16 or float32."
        )


def _static_engine(recipe: Recipe, environment: Environment, role: str) -> Iterator[str]:
    size = getattr(recipe, role).context_parallel_size
    if recipe.rollout.engine == "static" and size > 1 and environment.uses_transformer_engine:
        yield (
            f"rollout.engine=static contradicts {role}.context_parallel_size={size} with Transformer Engine, whose "
            "attention would treat each whole sequence as one rank's share; set rollout.engine=dynamic."
        )


def _variables(environment: Environment) -> Iterator[str]:
    if not environment.uses_transformer_engine:
        return
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        value = environment.variables.get(name, "1")
        if value != "1":
            yield (
                f"the environment variable {name}={value} keeps Megatron from choosing among Transformer Engine's "
                f"attentions, and it expects 1; unset {name}."
            )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
