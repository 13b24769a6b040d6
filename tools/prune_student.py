#!/usr/bin/env python
"""Make a smaller student: a Hugging Face folder with some of a model's layers only, renumbered, and its tokenizer.

    python tools/prune_student.py --hf-path MODEL --keep-layers 0-9,20-29 --output STUDENT
    python tools/prune_student.py --hf-path MODEL --drop-layers 3,5-7 --output STUDENT

Weights are copied as bytes, a few megabytes at a time: neither memory nor the kind of numbers matters.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.files import model_files

_INDEX = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_CHUNK_BYTES = 8 << 20


def main(argv: list[str] | None = None) -> int:
    """Prune; print what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-path", type=Path, required=True, help="Hugging Face folder of the model")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep-layers", metavar="LIST", help="layers that stay, from 0: 0-9,20-29")
    which.add_argument("--drop-layers", metavar="LIST", help="layers that go")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    arguments = parser.parse_args(argv)
    try:
        kept = prune(arguments.hf_path, arguments.output, arguments.keep_layers, arguments.drop_layers)
    except UserError as error:
        print(f"prune_student: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {arguments.output}: {len(kept)} layers, those of {arguments.hf_path} numbered {kept}")
    return 0


def prune(hf_path: Path, output: Path, keep: str | None = None, drop: str | None = None) -> list[int]:
    """Write `output` with the layers `keep`, or all but `drop`; atomic.

    Returns:
        The old numbers of the layers kept.

    Raises:
        UserError: the folder cannot be used, a layer does not exist, none is left, or the output exists.
    """
    config = _read_json(hf_path / "config.json")
    count = config.get("num_hidden_layers")
    if not isinstance(count, int):
        raise UserError(f"{hf_path / 'config.json'} has no num_hidden_layers; give the folder of a language model.")
    kept = _choose(count, keep, drop)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output {output} exists already; remove it or give another folder.")
    headers = {file: _read_header(file) for file in model_files(hf_path)}
    _check_layers(hf_path, headers, count)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for file in sorted(hf_path.iterdir()):
            if file.is_file() and file.suffix not in _WEIGHTS and not file.name.endswith(".index.json"):
                shutil.copy(file, temporary / file.name)
        (temporary / "config.json").write_text(json.dumps(_pruned_config(config, kept), indent=2) + "\n")
        _write_weights(headers, temporary, {old: new for new, old in enumerate(kept)})
        os.rename(temporary, output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return kept


def _choose(count: int, keep: str | None, drop: str | None) -> list[int]:
    if keep is not None:
        return _parse_layers(keep, count, "--keep-layers")
    assert drop is not None  # one of both is given
    dropped = _parse_layers(drop, count, "--drop-layers")
    kept = [i for i in range(count) if i not in dropped]
    if not kept:
        raise UserError(f"--drop-layers={drop} leaves none of the {count} layers; drop fewer.")
    return kept


def _parse_layers(text: str, count: int, option: str) -> list[int]:
    """Read "0-2,5" as [0, 1, 2, 5]."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"{option}={text}: {part!r} is no layer and no range; write for example 0-9,20-29.")
        if last >= count:
            raise UserError(f"{option}={text}: there is no layer {last}; the model's are 0 to {count - 1}.")
        layers.update(range(first, last + 1))
    return sorted(layers)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); give the folder of a Hugging Face model.") from error


def _read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header: tensors by name, data_offsets made absolute, without the metadata."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            header = json.loads(source.read(length))
        header.pop("__metadata__", None)
        for tensor in header.values():
            tensor["data_offsets"] = [8 + length + offset for offset in tensor["data_offsets"]]
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        if file.stat().st_size < end:
            raise ValueError(f"{file.stat().st_size} bytes instead of {end}")
    except (OSError, ValueError, struct.error, MemoryError, OverflowError) as error:
        raise UserError(f"{file} is missing, cut short or no safetensors file ({error}); fetch it again.") from error
    return header


def _check_layers(hf_path: Path, headers: dict[Path, dict[str, Any]], count: int) -> None:
    matches = [_LAYER.match(name) for header in headers.values() for name in header]
    found = {int(match[2]) for match in matches if match}
    if found != set(range(count)):
        wrong = min(found ^ set(range(count)))
        raise UserError(
            f"{hf_path}: config.json says {count} layers, and layer {wrong} is "
            f"{'one too many' if wrong in found else 'missing'} among the weights (model.layers.{wrong}.*)."
        )


def _pruned_config(config: dict[str, Any], kept: list[int]) -> dict[str, Any]:
    pruned = {**config, "num_hidden_layers": len(kept)}
    if isinstance(config.get("layer_types"), list):
        pruned["layer_types"] = [config["layer_types"][i] for i in kept]
    return pruned


def _write_weights(headers: dict[Path, dict[str, Any]], output: Path, new_number: dict[int, int]) -> None:
    """Write each file's tensors that stay into a separate file, and the index if there are several."""
    parts = []
    for file, header in headers.items():
        stays = {new: header[old] for old in header if (new := _renamed(old, new_number)) is not None}
        if stays:
            parts.append((file, stays))
    weight_map: dict[str, str] = {}
    total = 0
    for number, (file, tensors) in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        total += _copy_tensors(file, tensors, output / name)
        weight_map.update(dict.fromkeys(tensors, name))
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (output / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _renamed(name: str, new_number: dict[int, int]) -> str | None:
    """Return a tensor's new name, None if it goes."""
    match = _LAYER.match(name)
    if match is None:
        return name
    new = new_number.get(int(match[2]))
    return None if new is None else f"{match[1]}{new}{match[3]}"


def _copy_tensors(file: Path, tensors: dict[str, Any], output: Path) -> int:
    """Write a safetensors file with `tensors` of `file`; return the bytes of the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(tensors.items(), key=lambda item: item[1]["data_offsets"])
    end = 0
    for name, tensor in ordered:
        start, stop = tensor["data_offsets"]
        header[name] = {**tensor, "data_offsets": [end, end + stop - start]}
        end += stop - start
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("rb") as source, output.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            _copy_bytes(source, target, *tensor["data_offsets"])
    return end


def _copy_bytes(source: BinaryIO, target: BinaryIO, start: int, stop: int) -> None:
    source.seek(start)
    while start < stop:
        chunk = source.read(min(_CHUNK_BYTES, stop - start))
        target.write(chunk)
        start += len(chunk)


if __name__ == "__main__":
    sys.exit(main())
