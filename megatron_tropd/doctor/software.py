"""Checks of what is installed: versions and their fitness, GPUs, one software on all ranks, the recipe's needs."""

from __future__ import annotations

from collections import Counter

from megatron_tropd.config import Recipe
from megatron_tropd.doctor.report import Check
from megatron_tropd.machine.environment import REQUIREMENTS, Environment, Requirement, misfit, remedy
from megatron_tropd.machine.preflight import problems


def software_checks(recipe: Recipe, environment: Environment) -> list[Check]:
    """Return one check for Python, torch's CUDA and NCCL, each package, and each problem of the recipe here."""
    checks = [_python(environment)]
    for rule in REQUIREMENTS:
        if rule.optional and environment.package(rule.name).version is None:
            continue
        checks.append(_package(rule, recipe, environment))
        if rule.name == "torch":
            checks += [_cuda(environment), _nccl(environment)]
    return checks + [Check("recipe", "wrong", problem) for problem in problems(recipe, environment, clips=True)]


def _python(environment: Environment) -> Check:
    version = tuple(map(int, environment.python.split(".")[:2]))
    if version < (3, 10):
        return Check("Python", "wrong", environment.python, "take 3.10, 3.11 or 3.12")
    return Check("Python", "ok", environment.python if version <= (3, 12) else f"{environment.python}, untested")


def _package(rule: Requirement, recipe: Recipe, environment: Environment) -> Check:
    package = environment.package(rule.name)
    needed = rule.required or rule.name in _needs(recipe, environment)
    what = f"for {rule.user}"
    if package.version is None:
        install = remedy(rule.name, environment) if needed or environment.has_cuda else ""  # of no use on a CPU
        return Check(rule.name, "missing", what, install, needed)
    if package.problem is not None:
        return Check(
            rule.name, "wrong", f"{package.version}: {package.problem}", remedy(rule.name, environment), needed
        )
    expected = misfit(rule.name, package.version)
    if expected is not None:
        detail = f"{package.version}, {expected}, {what}"
        return Check(rule.name, "wrong", detail, remedy(rule.name, environment), needed)
    return Check(rule.name, "ok", package.version, needed=needed)


def _needs(recipe: Recipe, environment: Environment) -> set[str]:
    """Return the optional packages without which the recipe is refused."""
    needs = {"Transformer Engine"} if recipe.student.fp8 or recipe.teacher.fp8 else set()
    if recipe.objective.kernel == "triton":
        needs.add("Triton")
    if recipe.rollout.attention == "flash" and not environment.fits("flash-attn 3"):
        needs.add("flash-attn")
    return needs


def _cuda(environment: Environment) -> Check:
    gpus = Counter((gpu.name, round(gpu.memory_gb), gpu.capability) for gpu in environment.gpus)
    if gpus:
        described = ", ".join(f"{n} x {name} ({gb} GB, {a}.{b})" for (name, gb, (a, b)), n in gpus.items())
        return Check("CUDA", "ok", f"{environment.cuda}, {described}")
    if environment.has_driver and environment.variables.get("CUDA_VISIBLE_DEVICES") != "":
        why = "cannot use the driver of this machine" if environment.cuda else "is a build for the CPU"
        detail = f"this machine has an NVIDIA GPU, and torch {environment.package('torch').version} {why}"
        return Check("CUDA", "wrong", detail, "install the build for the driver's CUDA (nvidia-smi shows it)")
    return Check("CUDA", "missing", "no GPU is visible: everything runs on the CPU", needed=False)


def _nccl(environment: Environment) -> Check:
    if environment.nccl:
        return Check("NCCL", "ok", environment.nccl)
    if environment.has_cuda:
        return Check("NCCL", "missing", "torch was built without", "install torch's own wheels for CUDA")
    return Check("NCCL", "missing", "gloo is used on the CPU", needed=False)


def signature(environment: Environment) -> dict[str, str]:
    """Return what must be the same on every rank."""
    found = {name: package.version or "missing" for name, package in environment.packages.items()}
    found |= {"Python": environment.python, "CUDA": str(environment.cuda), "NCCL": str(environment.nccl)}
    return found | {"GPUs": ", ".join(sorted({gpu.name for gpu in environment.gpus})) or "none"}


def sameness(signatures: list[dict[str, str]], needed: bool = True) -> Check:
    """Compare the `signature`s of all ranks."""
    name, first = "same software on all ranks", signatures[0]
    for rank, other in enumerate(signatures):
        for key, value in other.items():
            if value != first[key]:
                detail = f"{key} is {first[key]} on rank 0 and {value} on rank {rank}"
                return Check(name, "wrong", detail, "start all ranks from one image or environment", needed)
    return Check(name, "ok", f"{len(signatures)} ranks")
