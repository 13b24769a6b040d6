"""Tokenizers: Hugging Face folders and bare sentencepiece models under one small interface, and their comparison.

tokenizer = load_tokenizer("models/Llama-3.1-8B-Instruct")
tokenizer.encode_prompt(prompt)        # chat template with generation prompt, or BOS + raw text
check_compatible(tokenizer, load_tokenizer("models/Llama-3.1-70B-Instruct"))
"""

from __future__ import annotations

import copy
import functools
import logging
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from megatron_tropd.config import ModelConfig, TokenizerConfig
from megatron_tropd.tokenizers.base import Tokenizer, checked_text
from megatron_tropd.tokenizers.chat_template import ChatTemplate, parse_date, read_folder_template, read_template
from megatron_tropd.tokenizers.files import open_folder, read_tokens
from megatron_tropd.tokenizers.hf_folder import TOKENIZER_FILES, matching_files, read_eos_ids
from megatron_tropd.tokenizers.probes import PROBES, check_same_ids
from megatron_tropd.tokenizers.sentencepiece_model import PieceModel
from megatron_tropd.types import UserError

logger = logging.getLogger(__name__)

_MAX_DIFFERENCES = 5
# Texts of one token each, after which a continuation is encoded. None of them grows together with every text.
_SENTINELS = ("\n", ".", "0", "a", ";", "好")
_STARTS = ("a", "A", "0", ".", "好")
_SPACES = ("▁", "Ġ")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that transformers reads."""

    def __init__(self, tokenizer: Any, eos_ids: set[int], template: ChatTemplate | None = None):
        """Wrap a transformers tokenizer; `eos_ids` are those of the generation config.

        `template` replaces the tokenizer's own.
        """
        self._tokenizer = tokenizer
        self.name = f"the tokenizer of {tokenizer.name_or_path or 'no folder'}"
        own = tokenizer.chat_template
        if template is None and own:
            template = ChatTemplate(own if isinstance(own, dict) else {"default": own}, self.name)
        self.template = template
        if template is not None:
            names = tokenizer.special_tokens_map.items()
            template.special_tokens = {key: str(token) for key, token in names if isinstance(token, str)}
        self._pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
        self.vocab_size = max(self._pieces) + 1
        eos = tokenizer.eos_token_id
        if eos is None and not eos_ids:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: responses could not end. Set "
                "eos_token in tokenizer_config.json or eos_token_id in generation_config.json."
            )
        self.eos_id = eos if eos is not None else min(eos_ids)
        self.eos_ids = {*eos_ids, self.eos_id}
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        probe = tokenizer("a").input_ids
        has_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self.bos_id = tokenizer.bos_token_id if has_bos else None
        self._heads = {text: ids for text in _SENTINELS if self.decode(ids := self.encode(text)) == text}
        starts = [self._pieces.get(ids[0], "") for text in _STARTS if (ids := self.encode(text))]
        self._puts_space = any(piece.startswith(_SPACES) for piece in starts)
        self._drops_space = self.decode(self._encode_continuation(" a")) != " a"

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        return self._tokenizer(checked_text(text), add_special_tokens=False).input_ids

    def _encode_continuation(self, text: str) -> list[int]:
        """Encode after a short text and cut that off, where the tokenizer puts a space in front of every text."""
        if not self._puts_space or not text:
            return self.encode(text)
        for sentinel, head in self._heads.items():
            ids = self.encode(sentinel + text)
            if ids[: len(head)] == head:
                return ids[len(head) :]
        return self.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def decode_response(self, ids: list[int]) -> str:
        """Return the text of `ids` that follow others: a space at their start is kept."""
        if self._puts_space or self._drops_space:
            for sentinel, head in self._heads.items():
                text = self.decode([*head, *ids])
                if text.startswith(sentinel):
                    return text[len(sentinel) :]
        return self.decode(ids)

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        return self._pieces

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(str(directory))


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model without transformers: a bare `.model` file, or a folder that transformers misreads."""

    def __init__(
        self,
        path: Path,
        template: ChatTemplate | None = None,
        model: PieceModel | None = None,
        special_tokens: Mapping[str, str] | None = None,
        eos_ids: Set[int] = frozenset(),
    ):
        """Read `path`.

        Args:
            path: the `.model` file.
            template: renders chat prompts.
            model: of `path` with tokens added, if it was read already.
            special_tokens: bos_token, eos_token and pad_token, where they are not the file's own.
            eos_ids: those of the generation config.
        """
        self._path, self.template = Path(path), template
        self.name = f"the sentencepiece model {path}"
        self._model = model or PieceModel(path)
        self._pieces = self._model.pieces()
        processor, names = self._model.processor, dict(special_tokens or {})
        self.vocab_size = max(self._pieces) + 1
        ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
        by_piece = {piece: i for i, piece in self._pieces.items()}
        ids |= {key: by_piece[names[key]] for key in ids if names.get(key) in by_piece}
        self.eos_id = ids["eos_token"]
        if self.eos_id < 0 and not eos_ids:
            raise UserError(f"{path} has no end-of-sequence piece: responses could not end. Train it with eos_id set.")
        self.eos_id = self.eos_id if self.eos_id >= 0 else min(eos_ids)
        self.eos_ids = {*eos_ids, self.eos_id}
        self.pad_id = ids["pad_token"] if ids["pad_token"] >= 0 else self.eos_id
        self.bos_id = ids["bos_token"] if ids["bos_token"] >= 0 else None
        if template is not None:
            texts = {key: self._pieces[i] if i >= 0 else "" for key, i in ids.items()}
            template.special_tokens = {**texts, "eos_token": self._pieces[self.eos_id], **names}

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it; control pieces in it are single ids."""
        return self._model.encode(checked_text(text))

    def _encode_continuation(self, text: str) -> list[int]:
        return self._model.encode(text, continues=True)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._model.decode(ids)

    def decode_response(self, ids: list[int]) -> str:
        """Return the text of `ids` that follow others: a space at their start is kept."""
        return self._model.decode(ids, continues=True)

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        return self._pieces

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        shutil.copy(self._path, Path(directory) / "tokenizer.model")


def open_tokenizer(config: TokenizerConfig, model: ModelConfig, hf_path: str | Path, role: str) -> Tokenizer:
    """Load the tokenizer that `tokenizer.*` names, by default that of a model's folder.

    Args:
        config: `tokenizer.*`.
        model: `student.*` or `teacher.*`.
        hf_path: the model's folder.
        role: "student" or "teacher".

    Raises:
        UserError: it cannot be read, or the model's checkpoint was made with another tokenizer than that of hf_path.
    """
    tokenizer = load_tokenizer(config.path or hf_path, config.chat_template, config.chat_template_kwargs, config.date)
    if config.check_compatibility and config.path is None and model.checkpoint and model.hf_path:
        inside = Path(model.checkpoint) / "hf"
        files = [folder / "tokenizer.json" for folder in (Path(hf_path), inside)]
        if not all(f.exists() for f in files) or files[0].read_bytes() != files[1].read_bytes():
            check_compatible(
                tokenizer, load_tokenizer(inside, with_template=False), (f"{role}.hf_path", f"{role}.checkpoint")
            )
    return tokenizer


def describe_check(folder: str | Path) -> str:
    """Read a Hugging Face folder's tokenizer and report how its ids were checked.

    Raises:
        UserError: it cannot be read.
    """
    folder = Path(folder)
    files = [name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).exists()]
    if not files and not (folder / "tokenizer_config.json").exists():
        return "tokenizer: the folder has none"
    tokenizer = load_tokenizer(folder, with_template=False)
    if not files:
        return f"tokenizer: {tokenizer.vocab_size} ids, not checked: there is no tokenizer.json or tokenizer.model"
    return f"tokenizer: {tokenizer.vocab_size} ids; {len(PROBES)} probe texts get the ids of {files[0]}"


def check_vocabulary(tokenizer: Tokenizer, hf_config: Any, role: str) -> None:
    """Raise UserError if the tokenizer has ids that the model of `role` does not embed."""
    if tokenizer.vocab_size > hf_config.vocab_size:
        beyond = [piece for i, piece in sorted(tokenizer.pieces().items()) if i >= hf_config.vocab_size]
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids and the {role} embeds only {hf_config.vocab_size} (beyond "
            f"are {', '.join(map(repr, beyond[:_MAX_DIFFERENCES]))}); give the {role}'s own tokenizer in "
            "tokenizer.path, or resize its embeddings."
        )


def load_tokenizer(
    path: str | Path,
    chat_template: str | Path | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    date: str | None = None,
    with_template: bool = True,
) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, of a folder with only tokenizer.model, or of a `.model` file.

    Args:
        path: folder or sentencepiece file.
        chat_template: file with a Jinja template that replaces the tokenizer's own.
        chat_template_kwargs: variables of the template for every prompt.
        date: what the template takes for today, in ISO format.
        with_template: False: chat prompts are not encoded, so a broken template does not matter.

    Raises:
        UserError: nothing there that can be read, or a template that does not compile.
    """
    path = Path(path)
    template = read_template(chat_template) if chat_template is not None and with_template else None
    if template is None and path.is_dir() and with_template:
        template = read_folder_template(path)
    if path.is_file() and path.suffix == ".model":
        tokenizer: Tokenizer = SentencePieceTokenizer(path, template)
    elif not path.is_dir():
        raise UserError(f"tokenizer {path}: no such folder or .model file; give tokenizer.path.")
    else:
        tokenizer = _load_folder(path, template)
    if tokenizer.template is not None:
        tokenizer.template.kwargs = dict(chat_template_kwargs or {})
        tokenizer.template.date = parse_date(date) if date else None
    return tokenizer


def _load_folder(path: Path, template: ChatTemplate | None) -> Tokenizer:
    has_hf = (path / "tokenizer.json").exists() or (path / "tokenizer_config.json").exists()
    if not has_hf and (path / "tokenizer.model").exists():
        return SentencePieceTokenizer(path / "tokenizer.model", template)
    (opened, is_misread), tokens, eos_ids = _open_once(path), read_tokens(path), set(read_eos_ids(path))
    if isinstance(opened, PieceModel):
        tokenizer: Tokenizer = SentencePieceTokenizer(path / "tokenizer.model", template, opened, tokens.named, eos_ids)
        if tokens.adds_bos is False:
            tokenizer.bos_id = None
        tokenizer.is_misread = is_misread
        return tokenizer
    opened.chat_template = None if template is None else template.texts  # what `save` writes
    tokenizer = HuggingFaceTokenizer(opened, eos_ids, template)
    tokenizer.is_misread = is_misread
    if tokens.adds_bos is not None and tokens.adds_bos != (tokenizer.bos_id is not None):
        tokenizer.bos_id = opened.bos_token_id if tokens.adds_bos else None
        logger.warning(
            "%s: tokenizer_config.json says add_bos_token=%s and transformers does otherwise; raw `text` prompts start "
            "%s BOS",
            *(path, tokens.adds_bos, "with" if tokens.adds_bos else "without"),
        )
    return tokenizer


def _open_once(path: Path) -> tuple[Any, bool]:
    """Return what `open_folder` does; a run asks for the same folders several times, and each takes seconds."""
    files = [*matching_files(path, TOKENIZER_FILES), *matching_files(path, ["config.json"])]
    states = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns, stat.st_ino) for file in files]
    opened, is_misread = _opened(path, tuple(states))
    return copy.copy(opened), is_misread  # each with its own chat template


@functools.lru_cache(maxsize=2)
def _opened(path: Path, states: tuple[tuple[str, int, int, int], ...]) -> tuple[Any, bool]:
    return open_folder(path)


def check_compatible(student: Tokenizer, teacher: Tokenizer, roles: tuple[str, str] = ("student", "teacher")) -> None:
    """Compare two tokenizers: the piece of every id, then the ids of probe texts; `roles` names them in messages.

    Raises:
        UserError: an id means different pieces, or only one of them has it (the message shows the first such ids), or
            a text is split otherwise.
    """
    ours, theirs, (first, second) = student.pieces(), teacher.pieces(), roles
    if ours == theirs:
        check_same_ids(student, teacher, roles)
        return
    different = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    shown = "; ".join(
        f"id {i}: {roles[0]} {_show(ours.get(i))}, {roles[1]} {_show(theirs.get(i))}"
        for i in different[:_MAX_DIFFERENCES]
    )
    raise UserError(
        f"{second} and {first} have different vocabularies (sizes {teacher.vocab_size} and {student.vocab_size}), and "
        f"token-level distillation needs the same; {len(different)} ids differ, first {shown}. Choose models of one "
        "family, or, if the differing ids never occur, set tokenizer.check_compatibility=false."
    )


def _show(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)
