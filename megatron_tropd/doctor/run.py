"""`megatron-tropd doctor`: what is installed, and whether everything that a recipe needs works on these devices.

The checks run at small size: each kernel against float64, a collective per process group, rounds of generate, score
and update with small models in the recipe's dtype and layout, a checkpoint written and read. Under torchrun all ranks
take part and rank 0 prints. The doctor reads no file that the recipe names.

    status = run_doctor(load_recipe("tiny"), "tiny")     # 0, or 1 where something that the recipe needs is wrong
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.config import Recipe
from megatron_tropd.doctor.report import Check, verdict
from megatron_tropd.doctor.software import sameness, signature, software_checks
from megatron_tropd.machine.environment import Environment, gather
from megatron_tropd.system.json_files import write_json
from megatron_tropd.system.launcher import launcher_rank

if TYPE_CHECKING:
    from megatron_tropd.doctor.agreement import Agreement
    from megatron_tropd.parallel.groups import ParallelGroups


@dataclass
class Report:
    """The checks so far; rank 0 prints each as it comes, and writes them all to a file if asked to."""

    title: str
    environment: Environment
    prints: bool
    file: str | None = None
    checks: list[Check] = field(default_factory=list)

    def begin(self) -> None:
        """Print the head."""
        self._print(self.title)

    def add(self, check: Check) -> Check:
        """Take and print a check."""
        self.checks.append(check)
        self._print(check.line())
        return check

    def end(self) -> int:
        """Print the verdict, write the file and return the exit status."""
        status = int(any(check.fails for check in self.checks))
        self._print(verdict(self.checks))
        if self.prints and self.file is not None:
            content = {
                "title": self.title,
                "status": status,
                "versions": signature(self.environment),
                "processes": self.environment.world_size,
                "checks": [check.record() for check in self.checks],
            }
            write_json(self.file, content)
        return status

    def abandon(self, check: Check) -> None:
        """Take a check that some ranks never ended, and end."""
        self.add(check)
        self._print("        the checks after it were not made")
        self.end()

    def _print(self, text: str) -> None:
        if self.prints:
            print(text, flush=True)


def run_doctor(recipe: Recipe, name: str | None, json_file: str | None = None, calibration: str | None = None) -> int:
    """Check all of it and print; collective over all processes of the launcher.

    Args:
        recipe: the defaults' where the user gave none.
        name: of the recipe.
        json_file: where rank 0 writes the checks.
        calibration: where rank 0 writes what the devices reach, for `plan`.

    Returns:
        0, or 1 where something that the recipe needs is missing or wrong; the same on every rank.
    """
    rank = launcher_rank()
    logging.getLogger("megatron_tropd").setLevel(logging.WARNING)  # the checks say it all
    environment = gather()
    report = Report(_title(recipe, name, environment), environment, prints=rank == 0, file=json_file)
    report.begin()
    for check in software_checks(recipe, environment):
        report.add(check)
    if any(check.fails and check.name in ("torch", "megatron-core", "transformers") for check in report.checks):
        return report.end()  # nothing else can be imported
    from megatron_tropd.doctor.agreement import Agreement

    agreement = Agreement(rank, environment.world_size, report.abandon)
    failed = [check for check in report.checks if check.fails]
    if not _stops(agreement, report, failed):
        _check_devices(recipe, environment, agreement, report, calibration)
    return agreement.finish(report.end)


def _title(recipe: Recipe, name: str | None, environment: Environment) -> str:
    device = environment.gpus[0].name if environment.gpus else "CPU"
    count = f"{environment.world_size} process{'es' if environment.world_size > 1 else ''}"
    what = f"recipe {name}" if name else "no recipe: the defaults"
    return f"megatron-tropd doctor, {what}, student.dtype={recipe.student.dtype}, {count}, {device}"


def _stops(agreement: Agreement, report: Report, failed: list[Check]) -> bool:
    """Whether nothing can be run: on any rank the recipe is refused, as `train` would refuse it."""
    title = "what the recipe needs"

    def refused() -> Check:
        if not failed:
            return Check(title, "ok", "is there")
        what = failed[0].detail if agreement.rank else "see above"  # what rank 0 lacks is printed already
        return Check(title, "wrong", what, "the checks after it were not made")

    check = report.add(agreement.run(title, refused))
    return check.fails


def _check_devices(
    recipe: Recipe, environment: Environment, agreement: Agreement, report: Report, calibration: str | None
) -> None:
    """Make the process groups, then every check that does something, as far as the ones before it allow."""
    from megatron_tropd.doctor.models import clip_layout
    from megatron_tropd.models.auto_dtype import auto_keys
    from megatron_tropd.parallel import groups as parallel

    model = clip_layout(recipe.student, environment.world_size)
    made: list[ParallelGroups] = []

    def start() -> Check:
        made.append(parallel.initialize(model, seed=recipe.training.seed, role="student"))
        parallel.any_rank(False)
        return Check("process groups", "ok", _layout_detail(recipe, model, environment))

    if report.add(agreement.run("process groups", start)).fails:
        return
    (groups,) = made
    if auto_keys(recipe) and report.add(agreement.run("dtype", partial(_resolved_dtypes, recipe))).fails:
        return
    model = clip_layout(recipe.student, environment.world_size)
    if environment.world_size > 1:
        name = "same software on all ranks"
        report.add(agreement.run(name, partial(_same_software, environment)))
    for name, body in _device_checks(recipe, environment, groups, model):
        report.add(agreement.run(name, body))
    _check_round(recipe, environment, agreement, report, groups)
    if calibration is not None:
        from megatron_tropd.doctor.calibrate import calibrate

        name = "calibration"
        report.add(agreement.run(name, partial(calibrate, calibration, environment, signature(environment))))
    parallel.shutdown()


def _layout_detail(recipe: Recipe, model: Any, environment: Environment) -> str:
    from megatron_tropd.parallel.layout import model_ranks, short_sizes

    layout, asked = (" ".join(short_sizes(m, ("TP", "PP", "CP"))) for m in (model, recipe.student))
    if layout == asked:
        return f"{layout}, the recipe's"
    return f"{layout}; the recipe's {asked} takes {model_ranks(recipe.student)} processes, not {environment.world_size}"


def _resolved_dtypes(recipe: Recipe) -> Check:
    from megatron_tropd.models.auto_dtype import resolve_dtypes

    return Check("dtype", "ok", resolve_dtypes(recipe) or "")


def _same_software(environment: Environment) -> Check:
    import torch.distributed as dist

    signatures: list[Any] = [None] * environment.world_size
    dist.all_gather_object(signatures, signature(environment))
    return sameness(signatures)


def _device_checks(
    recipe: Recipe, environment: Environment, groups: ParallelGroups, model: Any
) -> list[tuple[str, Callable[[], Check]]]:
    """Return the checks that need no models, with their names."""
    import torch

    from megatron_tropd import kernels
    from megatron_tropd.doctor.devices import attention_check, collective_check, groups_to_check
    from megatron_tropd.doctor.kernels import kernel_check

    dtype, implementation = getattr(torch, recipe.student.dtype), recipe.objective.kernel
    checks: list[tuple[str, Callable[[], Check]]] = []
    for name in kernels.__all__:
        check = partial(kernel_check, name, groups.tp, groups.device, dtype, implementation)
        checks.append((f"kernel {name}", check))
    for name, group in groups_to_check(groups).items():
        check = partial(collective_check, name, group, groups.device, environment)
        checks.append((f"all-reduce, {name}", check))
    return [*checks, ("Transformer Engine's attention", partial(attention_check, model, groups))]


def _check_round(
    recipe: Recipe, environment: Environment, agreement: Agreement, report: Report, groups: ParallelGroups
) -> None:
    """Build small models; where that works, run the rounds and write a checkpoint."""
    from megatron_tropd.doctor.rounds import Round

    made: list[Round] = []

    def build() -> Check:
        made.append(Round(recipe, groups))
        return Check("small models", "ok", made[0].describe())

    if report.add(agreement.run("small models", build)).fails:
        return
    report.add(agreement.run("generate, score, update", made[0].check))
    parent = _checkpoint_parent(recipe)
    report.add(agreement.run("checkpoint", partial(made[0].checkpoint_check, parent)))


def _checkpoint_parent(recipe: Recipe) -> Path:
    """Return the nearest folder that exists above the run's checkpoints: the file system that will hold them."""
    folder = Path(recipe.checkpoint.dir or Path(recipe.logging.dir) / "checkpoints").absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
