"""Compares a loaded tokenizer with a tokenizer.json by their JSON text, because loading the file again is slow.

is_same(tokenizer.backend_tokenizer, folder / "tokenizer.json", flags)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HEAD = ("added_tokens", "normalizer", "pre_tokenizer", "decoder")  # the post-processor only adds special tokens
_MODEL = '\n  "model": {'  # as tokenizers writes it; no string of JSON holds a line break
_EMPTY = ("continuing_subword_prefix", "end_of_word_suffix", "dropout", "unk_token")


def is_same(backend: Any, file: Path, flags: Mapping[str, Mapping[str, bool]]) -> bool:
    """Whether `backend`, a tokenizers.Tokenizer, has the vocabulary and the rules of `file`.

    Args:
        backend: as transformers made it.
        file: a tokenizer.json; False where it cannot be read.
        flags: flags of added tokens by text that take precedence over the file's; False where they differ.
    """
    try:
        said = _parts(file.read_text(encoding="utf-8"))
        ours = _parts(backend.to_str(pretty=True))
        if said[1] != ours[1] and _model(said[1]) != _model(ours[1]):
            return False
        if any(said[0].get(key) != ours[0].get(key) for key in _HEAD):
            return False
        added = {token["content"]: token for token in said[0].get("added_tokens") or []}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(text in added and flag.items() <= added[text].items() for text, flag in flags.items())


def _parts(text: str) -> tuple[dict[str, Any], str]:
    """Return all but the model, and the text of the model."""
    head, found, model = text.partition(_MODEL)
    if found:
        return json.loads(head.rstrip().rstrip(",") + "}"), "{" + model.rstrip().removesuffix("}").rstrip()
    content = json.loads(text)
    return content, json.dumps(content["model"])


def _model(text: str) -> dict[str, Any]:
    """Return a model in its canonical form."""
    model = json.loads(text)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return {**{key: value or None if key in _EMPTY else value for key, value in model.items()}, "merges": merges}
