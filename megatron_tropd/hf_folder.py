"""A Hugging Face folder's files beside its weights: the end-of-text ids that they name, and the tokenizer's.

read_eos_ids("models/Llama-3.1-8B-Instruct")   # {128001: "generation_config.json", 128008: ..., 128009: ...}
replace_tokenizer(folder, source, template)    # the folder then tokenizes as the run did
write_eos_ids(folder, {128001, 128009}, tokenizer)
"""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.errors import UserError

if TYPE_CHECKING:
    from megatron_tropd.tokenizer import Tokenizer

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    "chat_template*",
)
_NESTED = ("text_config", "llm_config", "decoder", "generator")  # where multimodal models keep their language model's


def read_eos_ids(folder: str | Path) -> dict[int, str]:
    """Return the ids that end a text according to a folder's files, each with the file that names it.

    As transformers does: generation_config.json, and where that names none, config.json (also that of the language
    model inside of it). A folder without these files names none.

    Raises:
        UserError: a file is not JSON, or its `eos_token_id` is neither an id nor a list of ids.
    """
    for name in (GENERATION_CONFIG, "config.json"):
        file = Path(folder) / name
        content = _read_json(file)
        sections = [content] if name == GENERATION_CONFIG else [content, *(content.get(key) for key in _NESTED)]
        for section in sections:
            ids = _ids(section.get("eos_token_id"), file) if isinstance(section, dict) else []
            if ids:
                return dict.fromkeys(ids, name)
    return {}


def write_eos_ids(folder: str | Path, ids: Iterable[int], tokenizer: Tokenizer) -> None:
    """Write `ids` as `eos_token_id` into a folder's generation_config.json, its other fields as they were.

    transformers' generate and vLLM then end a response where training did. Stop strings that are no special token are
    not written: with `stop_strings` in the file transformers' generate would demand a tokenizer in every call. A
    padding id that is none of the vocabulary becomes the tokenizer's.
    """
    file = Path(folder) / GENERATION_CONFIG
    content = _read_json(file)
    if not content and tokenizer.bos_id is not None:
        content["bos_token_id"] = tokenizer.bos_id
    wanted = set(ids)
    ordered = [i for i in read_eos_ids(folder) if i in wanted]  # transformers pads with the first one
    ordered += sorted(wanted - set(ordered))
    content["eos_token_id"] = ordered[0] if len(ordered) == 1 else ordered
    if not _is_id(content.get("pad_token_id"), tokenizer.vocab_size):
        content["pad_token_id"] = tokenizer.pad_id
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_files(source: str | Path, folder: str | Path, patterns: Iterable[str]) -> None:
    """Copy the files of `source` whose names match one of `patterns`; writable ones, whatever the source's are."""
    for file in sorted(Path(source).iterdir()):
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns):
            shutil.copyfile(file, Path(folder) / file.name)


def replace_tokenizer(folder: str | Path, source: str | Path | None, chat_template: str | Path | None) -> None:
    """Put another tokenizer's files, or another chat template, in the place of a folder's own.

    Args:
        folder: holds the tokenizer of the model.
        source: folder or sentencepiece `.model` file of the tokenizer to take; None: the folder's stays.
        chat_template: Jinja file; None: the tokenizer's own.
    """
    folder = Path(folder)
    if source is not None:
        for file in [f for f in folder.iterdir() if any(fnmatch.fnmatch(f.name, p) for p in TOKENIZER_FILES)]:
            file.unlink()
        if Path(source).is_file():
            shutil.copyfile(source, folder / "tokenizer.model")
        else:
            copy_files(source, folder, TOKENIZER_FILES)
    if chat_template is not None:
        shutil.copyfile(chat_template, folder / "chat_template.jinja")
        config = _read_json(folder / "tokenizer_config.json")
        if config.pop("chat_template", None) is not None:  # some readers prefer it to the file
            (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); restore the file, or remove it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, expected a JSON object; restore the file.")
    return content


def _ids(value: Any, file: Path) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int for i in ids):
        raise UserError(f"{file}: eos_token_id={value!r} is neither a token id nor a list of ids; correct the file.")
    return [i for i in ids if i >= 0]  # -1 stands for none


def _is_id(value: Any, vocab_size: int) -> bool:
    return type(value) is int and 0 <= value < vocab_size
