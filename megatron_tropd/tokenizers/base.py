"""The tokenizer interface that the stages use; tokenizers/tokenizer.py has the classes that read the pieces."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megatron_tropd.tokenizers.chat_template import ChatTemplate, parse_date
from megatron_tropd.types import Prompt, UserError

logger = logging.getLogger(__name__)

# What a template opens for the model, as <think>, at times closed again at once.
_OPENED = re.compile(r"<(\w{1,20})>\s*(</\1>\s*)?\Z")


class Tokenizer:
    """The tokenizer interface of all stages; subclasses provide the pieces.

    Attributes:
        vocab_size: ids 0 .. vocab_size - 1 are the true vocabulary: no id above carries probability in either model.
        eos_id: the id that ends a written response.
        eos_ids: every id that ends a generated one.
        pad_id: fills sequences; never looked at.
        bos_id: None where the tokenizer puts none before a text.
        name: file or folder, for messages.
        template: renders chat prompts; None where there is none.
        is_misread: transformers reads the folder otherwise than its files say; the ids here are the files'.
    """

    vocab_size: int
    eos_id: int
    eos_ids: set[int]
    pad_id: int
    bos_id: int | None
    name: str
    template: ChatTemplate | None
    is_misread: bool = False
    _told_bos = False

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

    def decode_response(self, ids: list[int]) -> str:
        """Return the text of `ids` that follow others: a space at their start is kept."""
        return self.decode(ids)

    def _encode_continuation(self, text: str) -> list[int]:
        raise NotImplementedError

    @property
    def uses_date(self) -> bool:
        """Whether the chat template asks for the current date."""
        return self.template is not None and self.template.uses_date

    def set_date(self, date: str) -> None:
        """Pin the date that the chat template gets, in ISO format; UserError if it is none."""
        if self.template is not None:
            self.template.date = parse_date(date)

    def prompt_text(self, prompt: Prompt) -> str:
        """Return the text of a prompt, the conversation rendered with special tokens as text.

        Raises:
            UserError: a chat prompt, and the tokenizer has no chat template or it refuses the messages.
        """
        if prompt.messages is None:
            assert prompt.text is not None  # the other kind of prompt
            return prompt.text
        if self.template is None:
            raise UserError(
                f"a chat prompt (`messages`) needs a chat template and {self.name} has none; give "
                "tokenizer.chat_template=FILE.jinja, or write the prompts as raw `text`"
            )
        return self.template.render(prompt.messages, prompt.tools, prompt.chat_template_kwargs)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids that a response follows: the templated chat, or BOS and the raw text.

        Raises:
            UserError: see `prompt_text`.
        """
        ids = self.encode(self.prompt_text(prompt))
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        if prompt.messages is None:
            return [self.bos_id, *ids]
        if not self._told_bos:
            self._told_bos = True
            logger.warning(
                "%s starts texts with BOS; chat prompts have none: the template writes no bos_token", self.name
            )
        return ids

    def encode_response(self, text: str, add_eos: bool = False) -> list[int]:
        """Return the ids of a written response, with EOS after it if asked.

        It continues the prompt: there is no space in front of it but its own.
        """
        ids = self._encode_continuation(checked_text(text))
        return ids + ([self.eos_id] if add_eos and ids[-1:] != [self.eos_id] else [])

    def encode_response_to(self, prompt: Prompt, text: str) -> list[int]:
        """Return the ids of a written response to `prompt`, without a tag at its start that the prompt ends with."""
        return self.encode_response(without_opening(text, self.prompt_text(prompt)))


def without_opening(text: str, prompt_text: str) -> str:
    """Return a response without the tag at its start that the prompt ends with.

    Templates of reasoning models open `<think>` themselves, and data sets of their responses write it as well.
    """
    opened = _OPENED.search(prompt_text[-200:])
    if opened is None or not text.lstrip().startswith(opened[0].strip()):
        return text
    rest = text.lstrip()[len(opened[0].strip()) :]
    blank = opened[0][len(opened[0].rstrip()) :]
    return rest[len(blank) :] if rest.startswith(blank) else rest.lstrip()


def checked_text(text: str) -> str:
    """Return `text`; UserError if it cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text holds half of a surrogate pair ({text[error.start]!r} at character {error.start}), which is no "
            "character; repair the file it comes from."
        ) from error
    return text
