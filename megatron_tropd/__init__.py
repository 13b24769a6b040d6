"""Trust Region On-Policy Distillation (TrOPD) for Megatron-Core.

What a user imports is named here and loaded on first use, so that `import megatron_tropd` costs and changes nothing.
"""

import importlib
import sys
import types
from typing import Any

_EXPORTS = {
    "Objective": "objectives",
    "Recipe": "config",
    "RolloutEngine": "rollout",
    "TeacherHook": "teacher",
    "UserError": "errors",
    "build_objective": "objectives",
    "load_recipe": "recipe",
    "save_recipe": "recipe",
    "validate": "validation",
}
__all__ = ["train", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)


class _Package(types.ModuleType):
    """Keeps `megatron_tropd.train` the function, though importing the module of that name sets the attribute."""

    @property
    def train(self) -> Any:
        return importlib.import_module(f"{self.__name__}.train").train

    @train.setter
    def train(self, module: types.ModuleType) -> None:
        """Ignore what the import system sets."""


sys.modules[__name__].__class__ = _Package
