"""Compares a checkpoint's recipe with the recipe that continues from it: the effect of each changed key.

Every key of the recipe belongs to exactly one of three tables (a test checks this). To add a key, add its name or a
pattern to the table that describes the effect of restarting a run with another value.

    changes = compare(read_settings(checkpoint / "recipe.yaml"), settings_of(recipe), old_contents, new_contents)
    refuse(changes, checkpoint)
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.recipe import recipe_sections

APPLIED, FIXED, IRRELEVANT, UNKNOWN = "applied", "fixed", "irrelevant", "unknown"
EFFECTS = {
    APPLIED: "applies from here on",
    FIXED: "cannot change within a run",
    IRRELEVANT: "does not matter to what is trained",
    UNKNOWN: "cannot be compared: the checkpoint does not record what was in that place",
}

# May change: training goes on with the new value, as if the run had been planned with it from this step on.
MAY_CHANGE = (
    *("teacher.hf_path", "teacher.checkpoint", "teacher.dtype", "student.fp8*", "teacher.fp8*"),
    "tokenizer.check_compatibility",
    "data.max_prompt_tokens",
    *("rollout.samples_per_prompt", "rollout.max_new_tokens", "rollout.temperature", "rollout.top_*", "rollout.stop"),
    *("rollout.on_*", "rollout.downweight", "rollout.repetition_*"),
    "guidance.*",
    *("objective.name", "objective.gate*", "objective.outlier", "objective.topk", "objective.tail", "objective.clip"),
    *("objective.alpha", "objective.ppo_clip", "objective.entropy_*", "objective.mixture"),
    *("objective.exploration_*", "objective.refinement_mask"),
    *("objective.beta", "objective.temperature", "objective.importance*"),
    *("training.steps", "training.prompts_per_step", "training.lr", "training.min_lr", "training.lr_*"),
    *("training.weight_decay", "training.adam_*", "training.clip_grad", "training.seed"),
    *("training.on_nan", "training.max_skipped_steps", "training.*_spike_factor", "training.spike_window"),
    "evaluation.*",
)

# May not change: key -> why, to which the refusal adds the remedy.
MAY_NOT_CHANGE = {
    "student.hf_path": "the run continues from the checkpoint's weights, so another student would have no effect",
    "student.checkpoint": "the run continues from the checkpoint's weights, so another student would have no effect",
    "student.dtype": "the optimizer's state is stored for that type",
    "tokenizer.path": "the student was trained on this tokenizer's ids",
    "tokenizer.chat_template": "it makes other prompts of the same file",
    "tokenizer.chat_template_kwargs": "they make other prompts of the same file",
    "tokenizer.date": "the template writes it into the prompts",
    "data.prompts": "the order of the prompts is that of the file's contents",
    "data.seed": "the order of the prompts follows from it",
    "data.shuffle": "the order of the prompts follows from it",
    "data.weights": "the order of the prompts follows from it",
    "data.columns.*": "it makes other prompts of the same file",
    "data.skip_long_prompts": "it leaves other prompts in the order",
    "data.deduplicate": "it leaves other prompts in the order",
    "data.assistant_turn": "it makes other prompts of the same file",
    "training.optimizer": "the optimizer's state is of no use to the other",
    "training.use_distributed_optimizer": "the optimizer's state is stored in another format",
}

# Does not matter to what is trained: where, how fast and in how much memory the same numbers are computed.
DOES_NOT_MATTER = (
    *("student.*_parallel_size", "student.num_layers_in_*", "student.account_for_*", "student.sequence_parallel"),
    *("student.recompute", "student.verify"),
    *("teacher.*_parallel_size", "teacher.num_layers_in_*", "teacher.account_for_*", "teacher.sequence_parallel"),
    *("teacher.recompute", "teacher.offload", "teacher.ranks", "teacher.replicas", "teacher.verify"),
    *("rollout.engine", "rollout.attention", "rollout.cuda_graphs", "rollout.max_batch_size", "rollout.kv_cache_gb"),
    "objective.kernel",
    *("training.exit_step", "training.micro_batch_size", "training.max_tokens_per_micro_batch"),
    *("training.deterministic", "training.overlap_*", "training.timeout_minutes", "training.offload_optimizer"),
    *("checkpoint.*", "logging.*"),
)

# Keys whose value the first start of a run fixes -> the value with which a recipe leaves them to the checkpoint's.
PINNED = {
    "tokenizer.date": None,
    "student.dtype": "auto",
    "teacher.dtype": "auto",
    "objective.exploration_steps": None,
}

# Keys that name files or folders -> the name of their contents (fingerprint.recipe_contents): what is compared.
CONTENTS = {
    **{f"{role}.{key}": role for role in ("student", "teacher") for key in ("hf_path", "checkpoint")},
    **{f"tokenizer.{key}": "tokenizer" for key in ("path", "chat_template")},
    **{
        key: key
        for key in (
            *("data.prompts", "guidance.responses"),
            *("evaluation.problems", "evaluation.held_out", "evaluation.held_out_responses"),
        )
    },
}


@dataclass(frozen=True)
class Change:
    """One key whose value, or the contents of whose files, are not those of the checkpoint."""

    key: str
    old: Any
    new: Any
    kind: str  # APPLIED, FIXED, IRRELEVANT or UNKNOWN

    def __str__(self) -> str:
        if self.old == self.new:
            return f"{self.key}: other contents in {self.new or 'the place of its default'}"
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def classes_of(key: str) -> list[str]:
    """Return the classes whose tables name a key: one, for every key of the recipe."""
    tables = {APPLIED: MAY_CHANGE, FIXED: MAY_NOT_CHANGE, IRRELEVANT: DOES_NOT_MATTER}
    return [kind for kind, table in tables.items() for pattern in table if fnmatch.fnmatchcase(key, pattern)]


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by `section.key`."""
    return dict(_leaves(vars(recipe), lambda value: vars(value) if is_dataclass(value) else None))


def read_settings(path: str | Path) -> dict[str, Any]:
    """Read the values that a recipe.yaml of a run or a checkpoint holds, whatever version wrote it.

    Raises:
        UserError: it cannot be read, or it is not a whole recipe.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read as a recipe ({' '.join(str(error).split())}); restore it.") from error
    if not isinstance(content, dict) or not all(isinstance(keys, dict) for keys in content.values()):
        raise UserError(f"{path} is not the recipe of a run: expected a section of keys under each name; restore it.")
    sections = set(recipe_sections())
    tree = {str(name): keys for name, keys in content.items()}
    return dict(_leaves(tree, lambda value: value if isinstance(value, dict) else None, sections))


def _leaves(
    tree: dict[str, Any],
    children: Callable[[Any], dict[str, Any] | None],
    sections: set[str] | None = None,
    above: str = "",
) -> Iterator[tuple[str, Any]]:
    """Yield the full name and value of every key; `sections`: what of `tree` are sections, None: all that have keys."""
    for name, value in tree.items():
        keys = children(value)
        if keys is not None and (sections is None or not above or f"{above}{name}" in sections):
            yield from _leaves(keys, children, sections, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def compare(
    old: dict[str, Any], new: dict[str, Any], old_contents: dict[str, str], new_contents: dict[str, str]
) -> list[Change]:
    """Return what differs, in the order of the recipe's keys.

    Args:
        old: the checkpoint's settings; a key that it lacks had its default. Keys that no longer exist are ignored.
        new: all settings of the recipe that continues.
        old_contents: digests of the files that the checkpoint's recipe named (fingerprint.recipe_contents).
        new_contents: digests of the files that the recipe names now.

    Files count by what they hold: a folder that was moved is no change, another model in the same place is one.
    """
    defaults = settings_of(Recipe())
    before = {key: old.get(key, defaults.get(key)) for key in new}
    changed = {key for key in new if key not in CONTENTS and before[key] != new[key]}
    unknown: set[str] = set()
    for place in sorted(set(CONTENTS.values())):
        keys = [key for key in new if CONTENTS.get(key) == place]
        differing = [key for key in keys if before[key] != new[key]]
        if place not in old_contents or place not in new_contents:
            changed.update(differing)
            unknown.update(key for key in differing if before[key] is not None and new[key] is not None)
        elif old_contents[place] != new_contents[place]:
            changed.add((differing or [key for key in keys if new[key] is not None] or keys)[0])
    return [
        Change(key, before[key], new[key], UNKNOWN if key in unknown else classes_of(key)[0])
        for key in new
        if key in changed
    ]


def refuse(changes: list[Change], what: str) -> None:
    """Raise UserError that names every change that may not be made; `what` begins the message."""
    fixed = [change for change in changes if change.kind == FIXED]
    if not fixed:
        return
    reasons = "; ".join(f"{change} ({_reason(change.key)})" for change in fixed)
    those = "that value" if len(fixed) == 1 else "those values"
    raise UserError(
        f"{what} with this recipe: {reasons}. Restore {those}, or start a new run with another logging.dir, or in "
        "the same folder with checkpoint.resume=false."
    )


def _reason(key: str) -> str:
    return next(reason for pattern, reason in MAY_NOT_CHANGE.items() if fnmatch.fnmatchcase(key, pattern))


def describe(changes: list[Change]) -> str:
    """Return one line per change with what becomes of it."""
    return "\n".join(f"  {change} ({EFFECTS[change.kind]})" for change in changes)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)
