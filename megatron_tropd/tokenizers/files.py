"""Loads a Hugging Face folder's tokenizer according to its files, whatever class transformers builds for it.

transformers rebuilds many tokenizers from parts of their files by rules of the named class, which differ between its
releases. Here its ids of probe texts are compared with those of tokenizer.json or tokenizer.model itself. If they
differ, the tokenizer is loaded from the file, with a warning that names the text.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.tokenizers.chat_template import read_json
from megatron_tropd.tokenizers.json_models import is_same
from megatron_tropd.tokenizers.probes import PROBES, first_difference, show_ids, special_probes
from megatron_tropd.tokenizers.sentencepiece_model import PieceModel

logger = logging.getLogger(__name__)

_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_LISTED = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "normalized", "single_word", "special")


@dataclass
class FolderTokens:
    """What a folder's small files say of tokens.

    Attributes:
        named: bos_token, eos_token and so on.
        listed: further special tokens.
        added: id and flags of added tokens by text, as added_tokens_decoder and added_tokens.json give them.
        adds_bos: `add_bos_token`, None where it is not set.
        legacy: whether every part after a special token starts a new text.
    """

    named: dict[str, str] = field(default_factory=dict)
    listed: list[str] = field(default_factory=list)
    added: dict[str, tuple[int, dict[str, bool]]] = field(default_factory=dict)
    adds_bos: bool | None = None
    legacy: bool = False


def read_tokens(folder: Path) -> FolderTokens:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json, as far as they are there."""
    config = read_json(folder / "tokenizer_config.json")
    tokens = FolderTokens(adds_bos=config.get("add_bos_token"), legacy=config.get("legacy") is True)
    for source in (read_json(folder / "special_tokens_map.json"), config):  # the second takes precedence
        tokens.named |= {name: _content(source[name]) for name in _NAMED if source.get(name)}
        for name in _LISTED:
            entries = source.get(name) or []
            tokens.listed += [_content(e) for e in (entries.values() if isinstance(entries, dict) else entries)]
    tokens.listed = list(dict.fromkeys(tokens.listed))
    for text, token in read_json(folder / "added_tokens.json").items():
        special = text in tokens.listed or text in tokens.named.values()
        tokens.added[text] = (token, {"special": special})
    for token, entry in (config.get("added_tokens_decoder") or {}).items():
        tokens.added[_content(entry)] = (int(token), {key: bool(entry[key]) for key in _FLAGS if key in entry})
    return tokens


def _content(entry: Any) -> str:
    return str(entry["content"]) if isinstance(entry, dict) else str(entry)


def open_folder(folder: Path) -> tuple[Any, bool]:
    """Return a folder's tokenizer, transformers' or a PieceModel, and whether transformers alone misreads the folder.

    The PieceModel is for folders that only sentencepiece reads as their file says.

    Raises:
        UserError: there is no tokenizer that can be read, or its files contradict each other.
    """
    tokens = read_tokens(folder)
    tokenizer, error = None, None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as caught:
        error = caught
    if (folder / "tokenizer.json").exists():
        opened = _as_json_says(folder, tokens, tokenizer, error)
    elif (pieces := _read_pieces(folder, tokens)) is not None:
        opened = _as_pieces_say(folder, pieces, tokenizer, error)
    elif error is not None:
        raise _unreadable(folder, error) from error
    else:
        opened = tokenizer
    _check_ids(folder, tokens, opened)
    _check_words(folder, opened)
    return opened, opened is not tokenizer


def _unreadable(folder: Path, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    return UserError(f"{folder} holds no tokenizer that transformers can read ({said}); give tokenizer.path.")


def _as_json_says(folder: Path, tokens: FolderTokens, tokenizer: Any, error: Exception | None) -> Any:
    from tokenizers import AddedToken, Tokenizer

    flags = {text: flags for text, (_, flags) in tokens.added.items() if len(flags) > 1}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and is_same(backend, folder / "tokenizer.json", flags):
        compare = functools.partial(_text_difference, specials=_specials(backend))
        if _difference(compare, backend, tokenizer, None) is None:
            _compare_with_pieces(folder, backend, tokens)
            return tokenizer
    try:
        file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as broken:
        raise _unreadable(folder, error or broken) from broken
    file.no_truncation()
    file.no_padding()
    # Flags that tokenizer_config.json gives to a token take precedence in all releases of transformers.
    known = file.get_vocab()
    for text, (_, given) in sorted(tokens.added.items(), key=lambda item: item[1][0]):
        if len(given) > 1 or text not in known:
            file.add_tokens([AddedToken(text, **{"normalized": False, **given})])
    _warn_of_new_rows(folder, tokens, file)
    compare = functools.partial(_json_difference, tokens=tokens)
    difference = _difference(compare, file, tokenizer, error)
    if difference:
        logger.warning(
            "%s: transformers reads this tokenizer otherwise than its tokenizer.json says: %s. The ids of "
            'tokenizer.json are used; for other programs set "tokenizer_class": "PreTrainedTokenizerFast" in '
            "tokenizer_config.json.",
            *(folder, difference),
        )
        tokenizer = _from_backend(folder, file, tokens)
        if difference := _difference(compare, file, tokenizer, None):
            raise UserError(
                f"{folder}: transformers does not give the ids of tokenizer.json: {difference}. Save the tokenizer "
                "again with the transformers release that made it, or give another folder in tokenizer.path."
            )
    _compare_with_pieces(folder, file, tokens)
    return tokenizer


def _warn_of_new_rows(folder: Path, tokens: FolderTokens, file: Any) -> None:
    for name in ("bos_token", "eos_token"):
        text = tokens.named.get(name)
        if text and file.token_to_id(text) is None:
            logger.warning(
                "%s: tokenizer_config.json names %s %r, which tokenizer.json does not have: transformers gives it a "
                "new id, of a row that the model has never used",
                *(folder, name, text),
            )


def _difference(
    compare: Callable[[Any, Any], str | None], reference: Any, tokenizer: Any, error: Exception | None
) -> str | None:
    """Return the result of `compare`, or why a tokenizer cannot be read or used; None if they are the same."""
    if tokenizer is not None:
        try:
            return compare(reference, tokenizer)
        except Exception as caught:  # some rebuilt tokenizers fail at the first text
            error = caught
    return f"it cannot read it ({' '.join(str(error).split())[:300]})"


def _specials(file: Any) -> list[str]:
    return [token.content for token in file.get_added_tokens_decoder().values()]


def _json_difference(file: Any, tokenizer: Any, tokens: FolderTokens) -> str | None:
    if said := _text_difference(file, tokenizer, _specials(file)):
        return said
    vocabulary, said = tokenizer.get_vocab(), file.get_vocab(with_added_tokens=True)
    if vocabulary != said:
        for piece, token in said.items():
            if vocabulary.get(piece) != token:
                return f"{piece!r} has the id {vocabulary.get(piece)}, not {token}"
        named = {*tokens.named.values(), *tokens.listed, *tokens.added}
        if extra := vocabulary.keys() - said.keys() - named:
            return f"it adds {min(extra)!r}, which no file names"
    return None


def _text_difference(file: Any, tokenizer: Any, specials: list[str]) -> str | None:
    """Return in what the ids of probe texts, or the texts of these ids, are not those of `file`."""

    def theirs(text: str) -> list[int]:
        return file.encode(text, add_special_tokens=False).ids

    def ours(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if found := first_difference(ours, theirs, [*PROBES, *special_probes(specials)]):
        return "{!r} gives the ids {}, not {}".format(found[0], *show_ids(*found[1:]))
    for text in PROBES:
        ids = theirs(text)
        shown = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if shown != file.decode(ids, skip_special_tokens=True):
            return f"the ids of {text!r} are decoded to {shown!r}, not {file.decode(ids, skip_special_tokens=True)!r}"
    return None


def _from_backend(folder: Path, file: Any, tokens: FolderTokens) -> Any:
    """Return a plain transformers tokenizer over that of tokenizer.json, with the special tokens of the folder."""
    from transformers import PreTrainedTokenizerFast

    listed = {"additional_special_tokens": tokens.listed} if tokens.listed else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=file, clean_up_tokenization_spaces=False, **tokens.named, **listed
    )
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _read_pieces(folder: Path, tokens: FolderTokens) -> PieceModel | None:
    """Return the folder's sentencepiece model with its added tokens, None if there is none (or it is tiktoken's)."""
    file = folder / "tokenizer.model"
    if not file.exists():
        return None
    added = {text: token for text, (token, _) in tokens.added.items()}
    try:
        plain = PieceModel(file)
    except UserError:
        return None
    size, known = plain.processor.vocab_size(), set(plain.pieces().values())
    taken = max([size - 1, *added.values()])
    for text in [*tokens.named.values(), *tokens.listed]:  # transformers appends those without an id
        if text not in added and text not in known:
            taken += 1
            added[text] = taken
    visible = [token for token, flags in tokens.added.values() if token >= size and not flags.get("special", True)]
    return PieceModel(file, added, visible, tokens.legacy)


def _as_pieces_say(folder: Path, pieces: PieceModel, tokenizer: Any, error: Exception | None) -> Any:
    difference = _difference(_pieces_difference, pieces, tokenizer, error)
    if difference is None:
        return tokenizer
    logger.warning(
        "%s: transformers reads this tokenizer otherwise than its tokenizer.model says: %s. The ids of tokenizer.model "
        "are used; programs that load the folder with transformers need a tokenizer.json that gives them.",
        *(folder, difference),
    )
    return pieces


def _pieces_difference(pieces: PieceModel, tokenizer: Any) -> str | None:
    def ours(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    if found := first_difference(ours, pieces.encode, [*PROBES, *special_probes(pieces.controls)]):
        return "{!r} gives the ids {}, not {}".format(found[0], *show_ids(*found[1:]))
    return None


def _compare_with_pieces(folder: Path, file: Any, tokens: FolderTokens) -> None:
    """Warn where a folder's tokenizer.json and tokenizer.model give other ids: the former takes precedence."""
    pieces = _read_pieces(folder, tokens)
    if pieces is None:
        return
    found = first_difference(lambda text: file.encode(text, add_special_tokens=False).ids, pieces.encode)
    if found:
        logger.warning(
            "%s: tokenizer.json and tokenizer.model disagree, as on %r: %s and %s. tokenizer.json is used, as "
            "transformers does.",
            *(folder, found[0], *show_ids(*found[1:])),
        )


def _check_ids(folder: Path, tokens: FolderTokens, opened: Any) -> None:
    """Refuse ids that tokenizer_config.json gives to a token and the vocabulary does not: another row would be used."""
    if isinstance(opened, PieceModel):
        return  # which takes the ids from there
    for text, (token, _) in tokens.added.items():
        actual = opened.convert_tokens_to_ids(text)
        if actual not in (token, None) and opened.convert_ids_to_tokens(actual) == text:
            raise UserError(
                f"{folder}: tokenizer_config.json (or added_tokens.json) gives {text!r} the id {token}, and the "
                f"vocabulary gives it {actual}; rename the token in tokenizer.json as well, or give another folder in "
                "tokenizer.path."
            )


def _check_words(folder: Path, opened: Any) -> None:
    """Warn of a tokenizer that does not give back plain words: responses are stored, graded and shown as text.

    Raises:
        UserError: it gives no ids at all, as those that transformers makes of files that are not their class's.
    """
    if isinstance(opened, PieceModel):
        return
    text = "Two words, 3 numbers"
    ids = opened(text, add_special_tokens=False).input_ids
    if not ids:
        raise UserError(
            f"{folder}: transformers reads a tokenizer ({type(opened).__name__}) that gives no ids for {text!r}: the "
            "files are not those of this class. Add tokenizer.json, or give another folder in tokenizer.path."
        )
    shown = opened.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if shown.strip(" ") != text:
        logger.warning("%s: the tokenizer decodes the ids of %r to %r", folder, text, shown)
