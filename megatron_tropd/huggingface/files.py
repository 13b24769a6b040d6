"""Finds the weight files of a Hugging Face folder, and reads their tensors slice by slice.

Adapters, optimizer states, `consolidated.safetensors` and subfolders are skipped, as in transformers. Experts that
transformers 5 has fused into one tensor per layer are read under the names of the single experts.

    with SafetensorsFolder("models/Llama-3.1-8B", "llama") as folder:
        folder.read("model.embed_tokens.weight", slice(0, 100))
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.mapping import expert_names, router_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PART = re.compile(r"model-(\d+)-of-(\d+)\.safetensors$")
_IGNORED = ("rotary_emb.inv_freq",)  # a buffer that old Llama files carry
_FUSED = re.compile(r"(model\.layers\.\d+\.)mlp\.experts\.(gate_up_proj|down_proj)$")
_ROUTER = re.compile(r"(model\.layers\.\d+\.)mlp\.gate\.weight$")
_ALL = slice(None)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def model_files(hf_path: str | Path) -> list[Path]:
    """Return the safetensors files that transformers would read, in order.

    Raises:
        UserError: there are none, one is missing, or it is unclear which are meant.
    """
    path = Path(hf_path)
    single, index = path / SINGLE, path / INDEX
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        missing = [name for name in names if not (path / name).exists()]
        if missing:
            raise UserError(f"{path}: {missing[0]} is named in {INDEX} and missing; fetch it again.")
        if single.exists() and SINGLE not in names:
            raise UserError(
                f"{path} holds {SINGLE} and {INDEX}, two models perhaps: transformers would read the first alone. "
                "Remove what is not meant."
            )
        return [path / name for name in names]
    if single.exists():
        return [single]
    matches = {file: _PART.match(file.name) for file in sorted(path.glob("model-*.safetensors"))}
    count_of = {file: match[2] for file, match in matches.items() if match}
    parts, counts = list(count_of), set(count_of.values())
    if not parts:
        raise UserError(_no_files(path))
    if len(counts) > 1 or len(parts) != int(counts.copy().pop()):
        raise UserError(
            f"{path} holds {len(parts)} parts of a model that was split into {' or '.join(sorted(counts))}, first "
            f"{parts[0].name}, and no {INDEX}; fetch the folder again."
        )
    return parts


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if weight_map and all(isinstance(file, str) for file in weight_map.values()):
            return weight_map
        problem = "weight_map names no files"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise UserError(f"{index} cannot be read ({problem}); fetch it again.")


def _no_files(path: Path) -> str:
    """Say what a folder without the model's safetensors files holds instead, and the way to them."""
    remedy = "save the model with transformers' save_pretrained, which writes them, or give another folder"
    if (path / "adapter_config.json").exists() or (path / "adapter_model.safetensors").exists():
        holds = "an adapter alone, without the model it belongs to"
        remedy = "load both with peft, merge_and_unload() and save_pretrained the result"
    elif list(path.glob("pytorch_model*.bin")):
        holds = "pytorch_model*.bin (pickles, which can run code when read)"
        remedy = (
            "load it with transformers (from_pretrained(..., weights_only=True)) and save_pretrained it, which writes "
            "model.safetensors"
        )
    elif list(path.glob("consolidated*")):
        holds = "consolidated.* alone, the original developers' format"
        remedy = "take the folder with model.safetensors, or convert it with transformers' conversion script"
    elif list(path.glob("*.gguf")):
        holds = "GGUF files"
        remedy = "load them with transformers (from_pretrained(..., gguf_file=...)) and save_pretrained the model"
    else:
        others = sorted(file.name for file in path.glob("*.safetensors"))
        holds = f"none of that name ({', '.join(others[:3])} are not read)" if others else ""
    return f"{path} holds no model*.safetensors files{', but ' + holds if holds else ''}; {remedy}."


@dataclass(frozen=True)
class _View:
    """Where a tensor lies: in a file under its own name, or as a part of a fused tensor."""

    handle: Any
    stored: str
    file: str
    expert: int | None = None
    start: int = 0  # its first row and number of rows in the expert's matrix
    rows: int = 0

    def shape(self) -> tuple[int, ...]:
        whole = tuple(self.handle.get_slice(self.stored).get_shape())
        return whole if self.expert is None else (self.rows, *whole[2:])

    def read(self, rows: slice, columns: slice) -> torch.Tensor:
        tensor = self.handle.get_slice(self.stored)
        if self.expert is None:
            dimensions = len(tensor.get_shape())
            return tensor[rows] if dimensions == 1 else tensor[rows, columns]
        first, last, _ = rows.indices(self.rows)
        return tensor[self.expert, self.start + first : self.start + last, columns]


class SafetensorsFolder:
    """The tensors of a model's safetensors files, read lazily; use as a context manager."""

    def __init__(self, hf_path: str | Path, model_type: str | None = None):
        """Open every file of the model.

        Args:
            hf_path: the folder.
            model_type: of an MoE model: fused experts are then found under the names of single ones.

        Raises:
            UserError: there are no safetensors files, one of the index is missing, cut short or lacks a tensor, or a
                tensor lies in two files.
        """
        self.path = Path(hf_path)
        self._stack = ExitStack()
        self._views: dict[str, _View] = {}
        try:
            for file in model_files(self.path):
                self._open(file)
            self._check_index()
        except BaseException:
            self._stack.close()
            raise
        if model_type is not None:
            self._views = _single_experts(self._views, model_type)

    def _open(self, file: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(str(file), framework="pt"))
        except Exception as error:
            with open(file, "rb") as stream:
                if stream.read(40).startswith(b"version https://git-lfs"):
                    raise UserError(
                        f"{file} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`."
                    ) from error
            raise UserError(f"{file} is cut short or no safetensors file ({error}); fetch it again.") from error
        inside = "/".join(file.parts[len(self.path.parts) :])  # as the index names it
        for name in handle.keys():  # noqa: SIM118 (no mapping)
            if name in self._views:
                raise UserError(
                    f"{self.path}: the tensor {name} is in {self._views[name].file} and in {inside}; remove the "
                    "file that is not meant, or fetch the folder again."
                )
            self._views[name] = _View(handle, name, inside)

    def _check_index(self) -> None:
        index = self.path / INDEX
        if not index.exists():
            return
        for name, file in _weight_map(index).items():
            if name not in self._views or self._views[name].file != file:
                where = f"; it is in {self._views[name].file}" if name in self._views else ""
                raise UserError(
                    f"{self.path}: {INDEX} names {name} in {file}, which lacks it{where}; fetch both again."
                )

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Return the names of the tensors, those of no use here left out."""
        return {name for name in self._views if not name.endswith(_IGNORED)}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._views[name].shape()

    def dtype_name(self, name: str) -> str:
        """Return the dtype of a tensor as safetensors calls it: BF16, F32, F8_E4M3, ..."""
        return self._views[name].handle.get_slice(self._views[name].stored).get_dtype()

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype of every tensor; UserError for one that is not of floating-point numbers."""
        named = {name: self.dtype_name(name) for name in sorted(self.names())}
        for name, dtype in named.items():
            if dtype not in _DTYPES:
                raise UserError(f"{self.path}: {name} is of {dtype}, expected one of {', '.join(_DTYPES)}.")
        return {name: _DTYPES[dtype] for name, dtype in named.items()}

    def dtype(self) -> torch.dtype:
        """Return the dtype of most numbers."""
        counts: Counter[torch.dtype] = Counter()
        for name, dtype in self.dtypes().items():
            counts[dtype] += math.prod(self.shape(name))
        return counts.most_common(1)[0][0]

    def read(self, name: str, rows: slice = _ALL, columns: slice = _ALL) -> torch.Tensor:
        """Read a slice of a tensor."""
        if name not in self._views:
            raise UserError(f"{self.path} lacks the tensor {name}; is config.json of the same model as the weights?")
        return self._views[name].read(rows, columns)

    def num_bytes(self) -> int:
        """Return the size of all tensors as they are stored."""
        return sum(math.prod(self.shape(name)) * dtype.itemsize for name, dtype in self.dtypes().items())

    def num_elements(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(math.prod(self.shape(name)) for name in self.names())


def _single_experts(views: dict[str, _View], model_type: str) -> dict[str, _View]:
    """Return the tensors with those that transformers 5 renamed or fused under the names that the mapping has."""
    names = expert_names(model_type)
    if names is None:
        return views
    gate, up, down = names
    found = {}
    for name, view in views.items():
        fused, router = _FUSED.match(name), _ROUTER.match(name)
        if router:
            found[router[1] + router_name(model_type)] = view
            continue
        if not fused or len(view.shape()) != 3:
            found[name] = view
            continue
        experts, rows, _ = view.shape()
        parts = (
            ((gate, 0, rows // 2), (up, rows // 2, rows - rows // 2))
            if fused[2] == "gate_up_proj"
            else ((down, 0, rows),)
        )
        for expert in range(experts):
            for source, start, count in parts:
                key = fused[1] + source.format(e=expert)
                found[key] = _View(view.handle, view.stored, view.file, expert, start, count)
    return found
