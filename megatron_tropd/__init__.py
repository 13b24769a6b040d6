"""Trust Region On-Policy Distillation (TrOPD) for Megatron-Core.

What a user imports is named here and loaded on first use, so that `import megatron_tropd` costs and changes nothing.
"""

import importlib
from typing import Any

_EXPORTS = {
    "Objective": "objective.objectives",
    "ParallelGroups": "parallel.groups",
    "Recipe": "config",
    "RolloutEngine": "rollout.engine",
    "Sampling": "types",
    "TeacherHook": "teacher.hook",
    "UserError": "errors",
    "build_model": "models.build",
    "build_objective": "objective.objectives",
    "build_student": "training.student",
    "initialize": "parallel.groups",
    "load_hf_config": "models.build",
    "load_model_weights": "models.convert",
    "load_prompts": "prompts.source",
    "load_recipe": "recipe",
    "load_tokenizer": "tokenizers.tokenizer",
    "pad_rollouts": "parallel.batching",
    "resolve_dtypes": "models.auto_dtype",
    "save_recipe": "recipe",
    "train": "training.loop",
    "train_step": "training.step",
    "validate": "validation",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
