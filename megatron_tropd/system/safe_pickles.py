"""Refuses pickles in a checkpoint that name anything but plain data, before a library unpickles them.

PyTorch's distributed checkpoints keep their index (`.metadata`) and some objects as pickles, and load both without
restriction: a checkpoint from elsewhere could run code. `check_folder` reads them first, allowing only the types that
such files need. Not covered: a file that is replaced between the check and the load, and flaws in torch's own reader.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tropd.errors import UserError

_INDEX_TYPES = {
    "torch.distributed.checkpoint.metadata": None,  # None: every class that the module itself defines
    "torch.distributed.checkpoint.planner": None,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size", "device", *(n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset", "dict", "list", "tuple", "int", "str", "slice", "complex", "bytearray"},
    **dict.fromkeys(("pathlib", "pathlib._local"), {"Path", "PosixPath", "PurePosixPath"}),
}


_BROKEN = (AttributeError, EOFError, ImportError, IndexError, TypeError, ValueError)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _INDEX_TYPES.get(module, set())
        # A dotted name would reach what the module imported, such as `os.system`.
        if "." not in name and (allowed is None or name in allowed):
            found = super().find_class(module, name)
            if allowed is not None or getattr(found, "__module__", None) == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_folder(folder: str | Path) -> None:
    """Raise UserError if a distributed checkpoint's index or an object in it holds more than plain data."""
    folder = Path(folder)
    index = folder / ".metadata"
    if not index.is_file():
        return
    try:
        with open(index, "rb") as file:
            metadata = _IndexUnpickler(file).load()
        for place in _objects(metadata):
            with open(folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                load_plain(io.BytesIO(file.read(place.length)))
        if (folder / "common.pt").is_file():  # Megatron's; TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD would load it unrestricted
            load_plain(folder / "common.pt")
    except (OSError, RuntimeError, pickle.UnpicklingError, *_BROKEN) as error:
        raise UserError(
            f"{folder} is not a checkpoint of plain data alone ({' '.join(str(error).split())[:200]}), and loading it "
            "could run code: it was not loaded. Use a checkpoint that this program wrote, or convert the model again."
        ) from error


def _objects(metadata: Any) -> list[Any]:
    """Return where the files hold objects that are no tensors."""
    kinds = metadata.state_dict_metadata
    places = (metadata.storage_data or {}).items()
    return [place for entry, place in places if type(kinds.get(entry.fqn)).__name__ == "BytesStorageMetadata"]


def load_plain(file: Any) -> Any:
    """Load what torch.save wrote, if it holds tensors, numpy arrays, numbers, texts and containers alone.

    Raises:
        pickle.UnpicklingError: it names anything else.
    """
    core = getattr(np, "_core", None) or np.core
    arrays = [core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype("uint32")), type(np.dtype("int64"))]
    if hasattr(core.multiarray, "scalar"):
        arrays.append(core.multiarray.scalar)
    with torch.serialization.safe_globals([*arrays, io.BytesIO]):
        return torch.load(file, map_location="cpu", weights_only=True)
