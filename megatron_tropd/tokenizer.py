"""Tokenizers: Hugging Face folders and bare sentencepiece models under one small interface, and their comparison.

tokenizer = load_tokenizer("models/Llama-3.1-8B-Instruct")
tokenizer.encode_prompt(prompt)        # chat template with generation prompt, or BOS + raw text
check_compatible(tokenizer, load_tokenizer("models/Llama-3.1-70B-Instruct"))
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from megatron_tropd.hf_folder import read_eos_ids
from megatron_tropd.types import Prompt, UserError

_MAX_DIFFERENCES = 5


class Tokenizer:
    """What the stages need of a tokenizer; subclasses say where the pieces come from.

    Attributes:
        vocab_size: ids 0 .. vocab_size - 1 are the true vocabulary: no id above carries probability in either model.
        eos_id: the id that ends a written response.
        eos_ids: every id that ends a generated one, by the tokenizer and the files beside it; see endings.py.
        pad_id: fills sequences; never looked at.
        bos_id: None where the tokenizer puts none before a text.
    """

    vocab_size: int
    eos_id: int
    eos_ids: set[int]
    pad_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        raise NotImplementedError

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        raise NotImplementedError

    def _encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        raise NotImplementedError

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids that a response follows: the templated chat, or BOS and the raw text.

        Raises:
            UserError: a chat prompt, and the tokenizer has no chat template.
        """
        if prompt.messages is not None:
            return self._encode_messages(prompt.messages)
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt.text)

    def encode_response(self, text: str, add_eos: bool = False) -> list[int]:
        """Return the ids of a written response, with EOS after it if asked."""
        return self.encode(text) + ([self.eos_id] if add_eos else [])


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that transformers reads."""

    def __init__(self, tokenizer: Any, eos_ids: set[int]):
        """Wrap a transformers tokenizer; `eos_ids` are those of the generation config."""
        self._tokenizer = tokenizer
        self._pieces = {i: piece for piece, i in tokenizer.get_vocab().items()}
        self.vocab_size = max(self._pieces) + 1
        eos = tokenizer.eos_token_id
        if eos is None and not eos_ids:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} has no end-of-sequence token: responses could not end. Set "
                "eos_token in tokenizer_config.json or eos_token_id in generation_config.json."
            )
        self.eos_id = eos if eos is not None else min(eos_ids)
        self.eos_ids = eos_ids | {self.eos_id}
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.eos_id
        probe = tokenizer("a").input_ids
        has_bos = tokenizer.bos_token_id is not None and probe[:1] == [tokenizer.bos_token_id]
        self.bos_id = tokenizer.bos_token_id if has_bos else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        return self._pieces

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        self._tokenizer.save_pretrained(str(directory))

    def _encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        if not self._tokenizer.chat_template:
            raise UserError(
                "a chat prompt (`messages`) needs a chat template and the tokenizer has none; give "
                "tokenizer.chat_template=FILE.jinja, or write the prompts as raw `text`"
            )
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.encode(text)


class SentencePieceTokenizer(Tokenizer):
    """A bare sentencepiece `.model` file; chat prompts need a template file."""

    def __init__(self, path: Path, chat_template: str | None):
        """Read `path`; `chat_template` is Jinja text that sees messages, bos_token, eos_token."""
        import sentencepiece

        self._path = path
        self._template = chat_template
        self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.vocab_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path} has no end-of-sequence piece: responses could not end. Train it with eos_id set.")
        self.eos_ids = {self.eos_id}
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text` without special tokens around it."""
        return self._processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids`, special tokens left out."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        return {i: self._processor.id_to_piece(i) for i in range(self.vocab_size)}

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        shutil.copy(self._path, Path(directory) / "tokenizer.model")

    def _encode_messages(self, messages: list[dict[str, str]]) -> list[int]:
        if self._template is None:
            raise UserError(
                f"a chat prompt (`messages`) needs a chat template, and a bare sentencepiece model ({self._path}) has "
                "none; give tokenizer.chat_template=FILE.jinja, or write the prompts as raw `text`"
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        bos = "" if self.bos_id is None else self._processor.id_to_piece(self.bos_id)
        eos = self._processor.id_to_piece(self.eos_id)
        rendered, _ = render_jinja_template(
            [messages], chat_template=self._template, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
        return self._encode_with_controls(rendered[0], {bos: self.bos_id, eos: self.eos_id})

    def _encode_with_controls(self, text: str, controls: dict[str, int | None]) -> list[int]:
        """Encode `text` with BOS and EOS as single ids: sentencepiece itself never parses control pieces from text."""
        if not text:
            return []
        for piece, token in controls.items():
            if piece and token is not None and piece in text:
                parts = text.split(piece)
                ids = self._encode_with_controls(parts[0], controls)
                for part in parts[1:]:
                    ids += [token, *self._encode_with_controls(part, controls)]
                return ids
        return self.encode(text)


def load_tokenizer(path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder, of a folder with only tokenizer.model, or of a `.model` file.

    Args:
        path: folder or sentencepiece file.
        chat_template: file with a Jinja template that replaces the tokenizer's own.

    Raises:
        UserError: nothing there that can be read.
    """
    path = Path(path)
    template = _read_template(chat_template)
    if path.is_file() and path.suffix == ".model":
        return SentencePieceTokenizer(path, template)
    if not path.is_dir():
        raise UserError(f"tokenizer {path}: no such folder or .model file; give tokenizer.path.")
    has_hf = (path / "tokenizer.json").exists() or (path / "tokenizer_config.json").exists()
    if not has_hf and (path / "tokenizer.model").exists():
        if template is None and (path / "chat_template.jinja").exists():  # a checkpoint carries the run's
            template = _read_template(path / "chat_template.jinja")
        return SentencePieceTokenizer(path / "tokenizer.model", template)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:
        raise UserError(
            f"{path} holds no tokenizer that transformers can read ({error}); give tokenizer.path."
        ) from error
    if template is not None:
        tokenizer.chat_template = template
    return HuggingFaceTokenizer(tokenizer, set(read_eos_ids(path)))


def _read_template(file: str | Path | None) -> str | None:
    if file is None:
        return None
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"tokenizer.chat_template={file} cannot be read ({error.strerror}); give a Jinja file."
        ) from error


def check_compatible(student: Tokenizer, teacher: Tokenizer) -> None:
    """Compare two vocabularies piece by piece.

    Raises:
        UserError: an id means different pieces, or only one of them has it; the message shows the first such ids.
    """
    ours, theirs = student.pieces(), teacher.pieces()
    if ours == theirs:
        return
    different = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    shown = "; ".join(
        f"id {i}: student {_show(ours.get(i))}, teacher {_show(theirs.get(i))}" for i in different[:_MAX_DIFFERENCES]
    )
    raise UserError(
        f"teacher and student have different vocabularies (sizes {teacher.vocab_size} and {student.vocab_size}), and "
        f"token-level distillation needs the same; {len(different)} ids differ, first {shown}. Choose models of one "
        "family, or, if the differing ids never occur, set tokenizer.check_compatibility=false."
    )


def _show(piece: str | None) -> str:
    return "nothing" if piece is None else repr(piece)
