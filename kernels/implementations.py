"""Which implementation of an operation runs: by argument, or Triton on CUDA and chunks elsewhere; logged once."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

NAMES = ("triton", "chunked", "reference")

_logged: set[tuple[str, str]] = set()


def triton_runs_on(device: torch.device) -> bool:
    """Whether Triton kernels can run there: CUDA, or the CPU with Triton's interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def choose(operation: str, folder: str, implementation: str, device: torch.device) -> ModuleType:
    """Return the module `kernels/<folder>/<implementation>.py`; `auto` is triton on CUDA, chunked elsewhere.

    Raises:
        ValueError: there is no implementation of that name, or it cannot run on `device`.
    """
    if implementation != "auto" and implementation not in NAMES:
        raise ValueError(f"{operation}: implementation {implementation!r} is none of auto, {', '.join(NAMES)}")
    name = implementation
    if name == "auto":
        name = "triton" if device.type == "cuda" and triton_runs_on(device) else "chunked"
    if name == "triton" and not triton_runs_on(device):
        raise ValueError(
            f"{operation}: implementation 'triton' cannot run on {device}; it needs the package triton, and CUDA or "
            "TRITON_INTERPRET=1 (set before the first import of triton). Use auto or chunked"
        )
    if (operation, name) not in _logged:
        _logged.add((operation, name))
        logger.info("%s: implementation %s", operation, name)
    return importlib.import_module(f"{__package__}.{folder}.{name}")
