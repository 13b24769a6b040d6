"""A sentencepiece model that also parses control pieces and added tokens, and continues texts.

model = PieceModel("tokenizer.model")
model.encode("[INST] Hi[/INST]")             # control pieces are single ids
model.encode("Hello", continues=True)        # without the space that starts a text
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_tropd.errors import UserError

# Fields of NormalizerSpec in the file's protobuf: what is appended to the file takes precedence.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_KEEP_ALL_SPACES = b"\x1a\x04\x18\x00\x20\x00"


class PieceModel:
    """Encodes and decodes under two rules: a separate text, or one that continues another.

    Attributes:
        processor: sentencepiece's own.
        added: ids of texts beside the file's pieces.
        controls: ids of all texts that are parsed as one id.
    """

    def __init__(
        self,
        path: str | Path,
        added: Mapping[str, int] | None = None,
        visible: Collection[int] = (),
        legacy: bool = False,
    ):
        """Read a `.model` file.

        Args:
            path: the file.
            added: ids of further texts, each parsed as one id; they take precedence over the file's pieces.
            visible: those of the added ids that are ordinary text, which `decode` shows.
            legacy: what follows a single id starts a new text (transformers' flag of this name).

        Raises:
            UserError: it is not a sentencepiece model.
        """
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"{path} is not a sentencepiece model ({str(error).strip().splitlines()[-1]}); give the tokenizer's "
                "Hugging Face folder (with tokenizer.json) in tokenizer.path."
            ) from error
        proto = self.processor.serialized_model_proto()
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
        self._verbatim = sentencepiece.SentencePieceProcessor(model_proto=proto + _KEEP_ALL_SPACES)
        self._collapses = self.processor.encode("a  b") == self.processor.encode("a b")
        self._own = self.processor.vocab_size()
        self.added = dict(added or {})
        self.controls = {
            self.processor.id_to_piece(i): i for i in range(self._own) if self.processor.is_control(i)
        } | self.added
        self._visible = set(visible)
        self._legacy = legacy
        self._added_pieces = {i: piece for piece, i in self.added.items()}
        names = sorted((name for name in self.controls if name), key=len, reverse=True)  # the longest match counts
        self._pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def pieces(self) -> dict[int, str]:
        """Return the piece of every id."""
        return {i: self.processor.id_to_piece(i) for i in range(self._own)} | self._added_pieces

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Return the ids of `text`, control pieces and added texts in it as single ids.

        `continues`: the text goes on after another one. Only what starts a text (at its very beginning or right after
        a BOS there) gets the space that most models put in front of a text (the dummy prefix).
        """
        ids: list[int] = []
        place, bos = 0, self.processor.bos_id()
        for match in [*self._pattern.finditer(text), None]:
            part = text[place : match.start() if match else len(text)]
            starts = (self._legacy and place > 0) or (not continues and ids in ([], [bos]))
            ids += self._encode_part(part, starts)
            if match:
                ids.append(self.controls[match[0]])
                place = match.end()
        return ids

    def _encode_part(self, text: str, starts: bool) -> list[int]:
        if not text:
            return []
        # Models that drop spaces in front of a text make the piece of a word after a space of the dummy prefix alone.
        if starts or (self._collapses and self._verbatim.encode(text[0], out_type=str) == ["▁"]):
            return self.processor.encode(text)
        return self._inner.encode(text)

    def decode(self, ids: list[int], continues: bool = False) -> str:
        """Return the text of `ids` without control pieces; `continues`: keep a space at the start."""
        text, run = "", []
        for token in [*map(int, ids), None]:
            if token is not None and token < self._own and token not in self._added_pieces:
                run.append(token)
                continue
            text += (self._verbatim if continues or text else self.processor).decode(run)
            run = []
            text += self._added_pieces[token] if token in self._visible else ""
        return text
