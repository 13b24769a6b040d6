"""The environment of a process: versions of packages and whether they import, its GPUs, and its launcher's numbers.

Only versions are judged here; `machine/preflight.py` checks the environment for a recipe.

    environment = gather()
    environment.package("flash-attn").importable
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_tropd.system.launcher import launcher_local_world_size, launcher_world_size

FLASH_ATTN_LEAST = "2.7.3"  # what Megatron-Core's dynamic inference insists on
FLASH_ATTN_CAPABILITY = (8, 0)  # least compute capability of a GPU


@dataclass(frozen=True)
class Requirement:
    """One line of the table of packages: supported versions, their users, and the fallback."""

    name: str  # as its users call it
    distributions: tuple[str, ...]  # the first one installed gives the version
    modules: tuple[str, ...]  # which must import, all of them
    user: str  # what needs it
    remedy: str
    least: str | None = None
    below: str | None = None
    required: bool = False  # nothing runs without it
    optional: bool = False  # not worth a line where it is missing
    counterfeit: str | None = None  # what else bears the name


REQUIREMENTS = (
    Requirement("torch", ("torch",), ("torch",), "everything", "pip install 'torch>=2.6'", least="2.6", required=True),
    Requirement(
        "megatron-core",
        ("megatron-core",),
        ("megatron.core",),
        "everything",
        "pip install 'megatron-core>=0.16,<0.20'",
        least="0.16",
        below="0.20",
        required=True,
    ),
    Requirement(
        "transformers",
        ("transformers",),
        ("transformers",),
        "tokenizers and model configurations",
        "pip install 'transformers>=4.51'",
        least="4.51",
        required=True,
    ),
    Requirement(
        "Transformer Engine",
        ("transformer-engine", "transformer_engine"),
        ("transformer_engine.pytorch",),
        "fused layers and fp8 on CUDA; Megatron's own layers are used otherwise, without fp8",
        "see transformer_engine_remedy",
    ),
    Requirement(
        "flash-attn",
        ("flash-attn",),
        ("flash_attn",),
        "fast attention of rollouts on CUDA; torch's own is used otherwise",
        f"pip install --no-build-isolation 'flash-attn>={FLASH_ATTN_LEAST}'",
        least=FLASH_ATTN_LEAST,
    ),
    Requirement(
        "flash-attn 3",
        ("flash-attn-3", "flash_attn_3"),
        ("flash_attn_3.flash_attn_interface",),
        "fast attention of rollouts on Hopper, in flash-attn's place",
        "build it from the folder `hopper` of flash-attention's source",
        optional=True,
    ),
    Requirement(
        "Apex",
        ("apex",),
        ("apex.optimizers", "fused_weight_gradient_mlp_cuda"),
        "fused accumulation of gradients on CUDA; torch's own is used otherwise",
        "build NVIDIA's from its source, https://github.com/NVIDIA/apex (PyPI's `apex` is another package)",
        counterfeit="PyPI's unrelated package of that name",
    ),
    Requirement(
        "Triton",
        ("triton",),
        ("triton",),
        "fast kernels on CUDA; chunked ones in plain torch are used otherwise",
        "pip install 'triton>=3.2'",
        least="3.2",
    ),
    Requirement(
        "Model Optimizer",
        ("nvidia-modelopt",),
        ("modelopt",),
        "the benchmark's peers and pruned or quantised students; optional",
        "pip install nvidia-modelopt",
    ),
)
_BY_NAME = {requirement.name: requirement for requirement in REQUIREMENTS}
_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Package:
    """What is there of a package: its version, and why it does not import; both None where it is not installed."""

    version: str | None = None
    problem: str | None = None

    @property
    def importable(self) -> bool:
        """Whether all its modules import."""
        return self.version is not None and self.problem is None


@dataclass(frozen=True)
class Gpu:
    """One GPU of this node."""

    name: str
    memory_gb: float
    capability: tuple[int, int]


@dataclass(frozen=True)
class Environment:
    """What this process runs on."""

    python: str
    packages: Mapping[str, Package]  # by Requirement.name
    gpus: tuple[Gpu, ...] = ()
    has_cuda: bool = False
    cuda: str | None = None  # version that torch was built for
    nccl: str | None = None
    has_driver: bool = False  # whether an NVIDIA GPU's device file is there
    world_size: int = 1
    local_world_size: int = 1  # processes on this node
    variables: Mapping[str, str] = field(default_factory=dict)  # those of _VARIABLES that are set

    def package(self, name: str) -> Package:
        """Return a package of REQUIREMENTS, by its name there."""
        return self.packages.get(name, Package())

    def fits(self, name: str) -> bool:
        """Whether a package imports, in a version that will do."""
        package = self.package(name)
        return package.importable and misfit(name, package.version) is None

    @property
    def has_flash_attention(self) -> bool:
        """Whether flash-attn, 2 or 3, can run the attention of rollouts."""
        return self.fits("flash-attn") or self.fits("flash-attn 3")

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether models are built of Transformer Engine's layers."""
        return self.has_cuda and self.package("Transformer Engine").version is not None

    @property
    def capability(self) -> tuple[int, int] | None:
        """The least compute capability of this node's GPUs; None without any."""
        return min((gpu.capability for gpu in self.gpus), default=None)


def misfit(name: str, version: str | None) -> str | None:
    """Return what is expected of a package's version where this one does not do; None where it does or is unknown."""
    if version is None:
        return None
    rule = _BY_NAME[name]
    try:
        parsed = Version(version)
    except InvalidVersion:  # a private build's
        return None
    release = Version(parsed.base_version)
    if rule.least is not None and release < Version(rule.least):
        return f"expected at least {rule.least}"
    if rule.below is not None and release >= Version(rule.below):
        return f"expected below {rule.below}"
    return None


def remedy(name: str, environment: Environment) -> str:
    """Return the command that installs a package where this environment is."""
    return transformer_engine_remedy(environment) if name == "Transformer Engine" else _BY_NAME[name].remedy


def transformer_engine_remedy(environment: Environment) -> str:
    """Return pip's command for the Transformer Engine that this megatron-core declares, built against this torch."""
    version = environment.package("megatron-core").version
    pinned = ">=2.9,<2.12" if version and Version(version).release[:2] <= (0, 16) else ">=2.9"
    core = "core_cu12" if (environment.cuda or "").startswith("12") else "core_cu13"
    # Built in isolation its extension would be compiled against another torch.
    return f"pip install --no-build-isolation 'transformer-engine[{core},pytorch]{pinned}'"


def gather() -> Environment:
    """Look at this process's packages, GPUs and launcher; imports what is installed, touches no GPU's memory."""
    import torch

    has_cuda = torch.cuda.is_available()
    count = torch.cuda.device_count() if has_cuda else 0
    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else None
    return Environment(
        python=platform.python_version(),
        packages={rule.name: _look_at(rule) for rule in REQUIREMENTS},
        gpus=tuple(_describe_gpu(torch.cuda.get_device_properties(i)) for i in range(count)),
        has_cuda=has_cuda,
        cuda=torch.version.cuda,
        nccl=".".join(map(str, nccl)) if isinstance(nccl, tuple) else None,
        has_driver=os.path.exists("/dev/nvidia0") or os.path.exists("/dev/nvidiactl"),
        world_size=launcher_world_size(),
        local_world_size=launcher_local_world_size(),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def _describe_gpu(properties: Any) -> Gpu:
    return Gpu(properties.name, properties.total_memory / 1e9, (properties.major, properties.minor))


def _look_at(rule: Requirement) -> Package:
    version = next(filter(None, map(_version, rule.distributions)), None)
    top = rule.modules[0].split(".")[0]
    if not _exists(top):
        return Package(version, None if version is None else f"its module {top} cannot be found")
    version = version or "of unknown version"
    for name in rule.modules:
        try:
            importlib.import_module(name)
        except BaseException as error:  # whatever a broken extension does while it loads
            if isinstance(error, KeyboardInterrupt):
                raise
            reason = str(error).strip().splitlines()[:1]
            what = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
            if rule.counterfeit and isinstance(error, ImportError):
                what = f"{what}; is it {rule.counterfeit}?"
            return Package(version, f"`import {name}` fails ({what})")
    return Package(version)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
