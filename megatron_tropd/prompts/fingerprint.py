"""Short digests of models, tokenizers and data files, to detect whether the contents of a path have changed.

Text files are read completely. Of large weight files, the size, the header and 64 blocks of 4 KiB are read, so a 70B
model takes a second. Training changes all of them, but a change of a few single numbers can pass unnoticed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.data.files import matches
from megatron_tropd.tokenizers.hf_folder import TOKENIZER_FILES, matching_files

_LENGTH = 16  # hexadecimal digits
_WHOLE = 1 << 20  # bytes up to which a weight file is read whole
_BLOCK, _BLOCKS = 4096, 64
_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def digest_of(content: Any) -> str:
    """Return the digest of a JSON-able value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]


def recipe_contents(recipe: Recipe) -> dict[str, str]:
    """Return digests of the models, the tokenizer and the data files that a recipe names, as far as they exist."""
    contents: dict[str, str | None] = {}
    for role in ("student", "teacher"):
        config = getattr(recipe, role)
        contents[role] = model_digest(config.hf_path, config.checkpoint)
    own = recipe.student.hf_path or (Path(recipe.student.checkpoint) / "hf" if recipe.student.checkpoint else None)
    contents["tokenizer"] = tokenizer_digest(recipe.tokenizer.path or own, recipe.tokenizer.chat_template)
    files = {
        "data.prompts": recipe.data.prompts,
        "guidance.responses": recipe.guidance.responses,
        "evaluation.problems": recipe.evaluation.problems,
        "evaluation.held_out": recipe.evaluation.held_out,
        "evaluation.held_out_responses": recipe.evaluation.held_out_responses,
    }
    contents |= {key: files_digest(paths) for key, paths in files.items()}
    return {key: digest for key, digest in contents.items() if digest is not None}


def model_digest(hf_path: str | Path | None, checkpoint: str | Path | None = None) -> str | None:
    """Return the digest of a model's configuration and weights; None where there are none.

    Args:
        hf_path: Hugging Face folder, whose weights count only without a checkpoint.
        checkpoint: weights checkpoint.
    """
    folder = Path(checkpoint or hf_path or "")
    if not (checkpoint or hf_path) or not folder.is_dir():
        return None
    state = hashlib.sha256()
    config = read_config(folder / "hf" if checkpoint else folder)
    state.update(json.dumps(config, sort_keys=True).encode())
    files = sorted(folder.glob("*.distcp" if checkpoint else "*.safetensors"))
    if not files:
        return None
    for file in files:
        state.update(file.name.encode())
        for block in _sample(file):
            state.update(block)
    return state.hexdigest()[:_LENGTH]


def read_config(folder: str | Path) -> dict[str, Any]:
    """Return the fields of config.json that define the model; empty where it cannot be read."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in config.items() if k not in _VOLATILE} if isinstance(config, dict) else {}


def tokenizer_digest(path: str | Path | None, chat_template: str | None = None) -> str | None:
    """Return the digest of a tokenizer's files and of the chat template that replaces its own; None without any."""
    if path is None or not Path(path).exists():
        return None
    folder = Path(path)
    files = [folder] if folder.is_file() else matching_files(folder, TOKENIZER_FILES)
    files += [Path(chat_template)] if chat_template else []
    state = hashlib.sha256()
    for file in sorted({file for file in files if file.is_file()}):
        state.update(file.name.encode() + _read(file))
    return state.hexdigest()[:_LENGTH]


def files_digest(paths: Any) -> str | None:
    """Return the digest of a data file, of a folder's, a glob's or a list's files; None where one is not there."""
    if not paths:
        return None
    state = hashlib.sha256()
    found = [matches(entry) for entry in (paths if isinstance(paths, list | tuple) else [paths])]
    if not all(found):
        return None
    for path in (path for entry in found for path in entry):
        if not path.exists():
            return None
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            state.update(_read(file))
    return state.hexdigest()[:_LENGTH]


def _read(file: Path) -> bytes:
    state = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            state.update(block)
    return state.digest()


def _sample(file: Path) -> Iterator[bytes]:
    size = file.stat().st_size
    yield str(size).encode()
    with open(file, "rb") as stream:
        if size <= _WHOLE:
            yield stream.read()
            return
        start = 0
        if file.suffix == ".safetensors":
            length = int.from_bytes(stream.read(8), "little")
            yield stream.read(min(length, 1 << 27))
            start = min(8 + length, size - _BLOCK)
        for i in range(_BLOCKS):
            stream.seek(start + (size - _BLOCK - start) * i // (_BLOCKS - 1))
            yield stream.read(_BLOCK)
