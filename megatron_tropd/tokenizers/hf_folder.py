"""Files of a Hugging Face folder other than weights: its EOS ids, and the files of the tokenizer.

read_eos_ids("models/Llama-3.1-8B-Instruct")   # {128001: "generation_config.json", 128008: ..., 128009: ...}
replace_tokenizer(folder, source, template)    # the folder then tokenizes as the run did
write_eos_ids(folder, {128001, 128009}, tokenizer)
leave_out_penalties(folder)                    # transformers then draws from the same probabilities as the run
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tropd.errors import UserError

if TYPE_CHECKING:
    from megatron_tropd.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
_FURTHER_TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", _FURTHER_TEMPLATES),
)
# What changes the most probable token or ends a response elsewhere, each with the value that does nothing.
_PENALTIES = {
    **{"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **{"encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None, "suppress_tokens": None},
    **{"begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "min_length": 0},
    **{"min_new_tokens": None, "exponential_decay_length_penalty": None, "guidance_scale": None},
    **{"num_beams": 1, "penalty_alpha": None, "dola_layers": None, "stop_strings": None},
}
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

    transformers' generate and vLLM then end a response where training did; config.json gets the same ids, for programs
    that read them there. Stop strings that are no special token are not written: with `stop_strings` in the file
    transformers' generate would demand a tokenizer in every call. A padding id that is none of the vocabulary becomes
    the tokenizer's.
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
    _write_json(file, content)
    config = _read_json(Path(folder) / "config.json")
    if config and not any(isinstance(config.get(key), dict) for key in _NESTED):
        _write_json(Path(folder) / "config.json", {**config, "eos_token_id": content["eos_token_id"]})


def leave_out_penalties(folder: str | Path) -> None:
    """Remove from a folder's generation_config.json what makes greedy decoding differ from the model's own choice.

    Repetition penalties and the like are no part of training or evaluation here; with them transformers and vLLM would
    write other texts than those that were graded. Temperature, top-k and top-p stay.
    """
    file = Path(folder) / GENERATION_CONFIG
    content = _read_json(file)
    active = [key for key, neutral in _PENALTIES.items() if content.get(key) not in (None, neutral, [], {})]
    if active:
        _write_json(file, {key: value for key, value in content.items() if key not in active})
        shown = ", ".join(f"{key}={content[key]!r}" for key in active)
        logger.info("the student's generation_config.json is saved without %s: the run uses none of it", shown)


def copy_files(source: str | Path, folder: str | Path, patterns: Iterable[str]) -> None:
    """Copy the files of `source` whose names, or paths in it, match one of `patterns`."""
    for file in matching_files(source, patterns):
        target = Path(folder) / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)  # not its mode: folders of models are often read-only, and some files are edited


def matching_files(folder: str | Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files of `folder` that match one of `patterns`, in order."""
    return sorted({file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()})


def replace_tokenizer(folder: str | Path, source: str | Path | None, chat_template: str | Path | None) -> None:
    """Put another tokenizer's files, or another chat template, in the place of a folder's own.

    Args:
        folder: holds the tokenizer of the model.
        source: folder or sentencepiece `.model` file of the tokenizer to take; None: the folder's stays.
        chat_template: Jinja file; None: the tokenizer's own.
    """
    folder = Path(folder)
    if source is not None:
        for file in matching_files(folder, TOKENIZER_FILES):
            file.unlink()
        if Path(source).is_file():
            shutil.copyfile(source, folder / "tokenizer.model")
        else:
            copy_files(source, folder, TOKENIZER_FILES)
    if chat_template is not None:
        for file in matching_files(folder, [_FURTHER_TEMPLATES]):  # they would be taken for prompts with tools
            file.unlink()
        text = Path(chat_template).read_text(encoding="utf-8-sig")  # transformers renders a byte order mark
        (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
        config = _read_json(folder / "tokenizer_config.json")
        if config.pop("chat_template", None) is not None:  # some readers prefer it to the file
            _write_json(folder / "tokenizer_config.json", config)


def name_plain_class(folder: str | Path) -> None:
    """Let transformers take a folder's tokenizer.json as it is, not rebuild it by the rules of a named class."""
    file = Path(folder) / "tokenizer_config.json"
    _write_json(file, {**_read_json(file), "tokenizer_class": "PreTrainedTokenizerFast"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
