"""`megatron-tropd train --dry-run`: the resolved recipe, what differs from the defaults, and the plan, as YAML.

print(show(recipe))  # everything but the recipe's own keys is a comment
"""

from __future__ import annotations

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.methods import METHODS
from megatron_tropd.models.auto_dtype import MEANING, auto_keys
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.parallel.layout import model_ranks
from megatron_tropd.parallel.partition import has_dedicated_teacher, teacher_size
from megatron_tropd.recipe import to_yaml
from megatron_tropd.recipe_changes import settings_of
from megatron_tropd.reporting.recipe_view import defaults
from megatron_tropd.reporting.recipe_view import show as shown
from megatron_tropd.system.launcher import launcher_world_size
from megatron_tropd.training.resume import decide


def show(recipe: Recipe) -> str:
    """Return the text.

    Raises:
        UserError: the recipe is wrong, or does not fit the run that it would continue.
    """
    build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
    start = decide(recipe)
    start.pin(recipe)
    comments = [*_differences(recipe), ""]
    if keys := auto_keys(recipe):
        comments += [f"{' and '.join(keys)}: auto is {MEANING}", ""]
    comments += _plan(recipe)
    if start.is_finished:
        comments += ["", f"finished: {start.step} steps are done in {recipe.logging.dir}"]
    elif start.checkpoint:
        comments += ["", f"would continue from {start.checkpoint} after step {start.step}"]
    return "\n".join([to_yaml(recipe).rstrip(), "#", *(f"# {line}".rstrip() for line in comments)])


def _differences(recipe: Recipe) -> list[str]:
    known = defaults()
    changed = [(key, value) for key, value in settings_of(recipe).items() if value != known[key][0]]
    method = METHODS[recipe.objective.name]
    lines = [f"objective {recipe.objective.name}: {method.what}", "", "differs from the defaults:"]
    width = max((len(key) for key, _ in changed), default=0)
    return lines + [f"  {key:<{width}}  {shown(value)}  (default {shown(known[key][0])})" for key, value in changed]


def _plan(recipe: Recipe) -> list[str]:
    """Return the plan for the processes that there are, or, without torchrun, for the fewest that hold the recipe."""
    from megatron_tropd.planning.job import job_of
    from megatron_tropd.planning.text import summary

    if METHODS[recipe.objective.name].data:
        return [f"no plan: objective.name={recipe.objective.name} has no teacher model"]
    gpus = launcher_world_size()
    if gpus == 1:
        gpus = _fewest(recipe)
    try:
        job = job_of(recipe, gpus, recipe.data.max_prompt_tokens or 512)
    except UserError as error:
        return [f"no plan: {error}"]
    lines = summary(job)
    return [
        f"plan for {gpus} GPU(s) (H100, 80 GB; `megatron-tropd plan` takes others):",
        *(f"  {line}" for line in lines),
    ]


def _fewest(recipe: Recipe) -> int:
    if has_dedicated_teacher(recipe):
        return model_ranks(recipe.student) + teacher_size(recipe.teacher)
    return max(model_ranks(recipe.student), model_ranks(recipe.teacher))
