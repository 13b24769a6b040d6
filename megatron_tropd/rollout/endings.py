"""The ids that end a response: the same for rollouts, evaluation, `generate` and checkpoints.

A response ends at the end-of-text ids of both models of a pair (generation_config.json, else config.json, the
tokenizer's eos_token, and the special token that its chat template writes after an assistant's turn), wherever both
vocabularies have the same piece at an id; and at special tokens named in `rollout.stop`. Checkpoints and exports carry
all of them in generation_config.json.

In the loss, only the models' end-of-text ids are treated as one EOS token (tokenizers/end_of_text.py). Another special
token in `rollout.stop` ends a response, but is scored like any other token.

    endings = find_endings(recipe, "student", tokenizer)
    engine = RolloutEngine(modules, tokenizer, groups, recipe.rollout, context, endings)
"""

from __future__ import annotations

import bisect
import logging
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tropd.config import ModelConfig, Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.models.convert import HF_FOLDER, resolve_hf_path
from megatron_tropd.rollout.decoding import Stops, explain_stops, is_special
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.tokenizers.hf_folder import (
    leave_out_penalties,
    name_plain_class,
    read_eos_ids,
    replace_tokenizer,
    write_eos_ids,
)
from megatron_tropd.tokenizers.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.types import Prompt

logger = logging.getLogger(__name__)

_QUESTION, _ANSWER = "Good morning", "answer"
_TURNS = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _QUESTION},
]


@dataclass(frozen=True)
class Endings:
    """What ends a response."""

    eos: frozenset[int]  # end-of-text ids of either model; finish_reason "eos"
    event: tuple[int, ...] = ()  # of these, the ids that the loss takes as one event; empty: nothing to merge
    stop_ids: frozenset[int] = frozenset()  # special tokens named in rollout.stop; finish_reason "eos" as well
    turn_end: int | None = None  # of `eos`, what the run's chat template writes after an assistant's turn
    origins: dict[int, str] = field(default_factory=dict)  # where each id of `eos` comes from, for messages

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Endings:
        """Return those that a tokenizer alone names."""
        return cls(frozenset(tokenizer.eos_ids))

    def eos_after(self, prompt: Prompt, tokenizer: Tokenizer) -> int:
        """Return the id to put after a written response, in a chat what ends an assistant's turn.

        A base model's tokenizer may have a chat template that ends turns with another token than its `eos_token`.
        """
        return tokenizer.eos_id if prompt.messages is None or self.turn_end is None else self.turn_end

    def end_of_text(self) -> EndOfText:
        """Return the event, for the loss."""
        return EndOfText(self.event)

    def finish_folder(self, folder: Path, recipe: Recipe, tokenizer: Tokenizer) -> None:
        """Let a checkpoint's Hugging Face folder tokenize and end responses as the run does."""
        replace_tokenizer(folder, recipe.tokenizer.path, recipe.tokenizer.chat_template)
        if tokenizer.is_misread and (folder / "tokenizer.json").exists():
            name_plain_class(folder)
        write_eos_ids(folder, self.eos | self.stop_ids, tokenizer)
        leave_out_penalties(folder)


@dataclass(frozen=True)
class _ModelEnds:
    """The end-of-text ids of one model."""

    named: dict[int, str]  # by its files, with their origins
    turn_end: int | None
    pieces: dict[int, str] | None  # of the model's tokenizer; None: there is none to compare

    @property
    def ids(self) -> dict[int, str]:
        """All ids at which it ends, with their origins."""
        return ({} if self.turn_end is None else {self.turn_end: "chat template"}) | self.named

    @property
    def is_complete(self) -> bool:
        """Whether the files name what the chat template writes after a turn; some do not."""
        return self.turn_end is None or self.turn_end in self.named


def find_endings(recipe: Recipe, role: str, tokenizer: Tokenizer) -> Endings:
    """Return what ends the responses of the recipe's `role`, "student" or "teacher".

    Args:
        recipe: `tokenizer.*`, `rollout.stop`, the model and, if it is named and can be read, the other model.
        role: the model that writes.
        tokenizer: the run's, by which all ids are understood.
    """
    own = _model_ends(recipe, role, tokenizer, is_writer=True)
    other_role = "teacher" if role == "student" else "student"
    other = _other_ends(recipe, other_role, tokenizer)
    pieces = tokenizer.pieces()
    turn_end = find_turn_end(tokenizer)
    origins = {} if turn_end is None else {turn_end: "chat template"}
    origins |= {i: f"tokenizer of {recipe.tokenizer.path}" for i in sorted(tokenizer.eos_ids) if i in pieces}
    origins |= {i: f"{role}: {origin}" for i, origin in _agreeing(own, role, pieces).items()}
    event: tuple[int, ...] = ()
    if other is not None:
        agreeing = _agreeing(other, other_role, pieces)
        if other.pieces is not None and not _end_alike(own, other):
            event = _event(set(own.ids) & set(origins) | set(agreeing), pieces, other.pieces)
        origins = {i: f"{other_role}: {origin}" for i, origin in agreeing.items()} | origins
    if other is not None and event:
        logger.warning(
            "%s and %s end with different ids, %s and %s: all of them are one event",
            *(role, other_role, sorted(own.ids), sorted(other.ids)),
        )
    for key in ("rollout", "evaluation"):
        explain_stops(tokenizer, getattr(recipe, key).stop, f"{key}.stop")
    stops = Stops.of(tokenizer, recipe.rollout.stop)
    if stops.texts:
        logger.info(
            "rollout.stop: %s end responses here; an exported model must be given them in each call", list(stops.texts)
        )
    logger.info("responses end at %s", "; ".join(f"{i} {pieces.get(i)!r} ({origins[i]})" for i in sorted(origins)))
    return Endings(frozenset(origins), event, stops.ids, turn_end, origins)


def find_turn_end(tokenizer: Tokenizer) -> int | None:
    """Return the special token that the chat template writes after an assistant's turn; None where it writes none."""
    try:
        ids = tokenizer.encode(tokenizer.prompt_text(Prompt("", messages=_TURNS)))
    except Exception:  # whatever a template raises; a prompt that it refuses is named where it is read
        return None

    def place_after(text: str, count: int) -> int:  # templates may begin with thousands of fixed tokens
        return bisect.bisect_left(range(len(ids)), count, key=lambda n: tokenizer.decode(ids[:n]).count(text))

    whole = tokenizer.decode(ids)
    if not (_QUESTION in whole and _ANSWER in whole):
        return None
    before = reversed(ids[: place_after(_QUESTION, 1)])
    opening = next(([token] for token in before if is_special(tokenizer, token)), [])
    for token in ids[place_after(_ANSWER, whole.count(_ANSWER)) :]:
        if is_special(tokenizer, token):  # without an end token, a turn is followed by the opening of the next
            return None if token in (*opening, tokenizer.bos_id) else token
        if tokenizer.decode([token]).strip():
            break
    return None


def _model_ends(recipe: Recipe, role: str, tokenizer: Tokenizer, is_writer: bool) -> _ModelEnds:
    """Read a model's ids; `tokenizer` is the run's, by default the one that the writing model's folder holds."""
    model: ModelConfig = getattr(recipe, role)
    folders = [resolve_hf_path(model, role)]
    if model.checkpoint is not None and model.hf_path is not None:
        folders.append(Path(model.checkpoint) / HF_FOLDER)
    named: dict[int, str] = {}
    for folder in folders:
        named = {i: str(Path(folder) / name) for i, name in read_eos_ids(folder).items()} | named
    path = recipe.tokenizer.path
    holds_the_runs = is_writer if path is None else Path(path).resolve() == folders[0].resolve()
    theirs = tokenizer if holds_the_runs else _load_or_none(folders[0])
    if theirs is None:
        return _ModelEnds(named, None, tokenizer.pieces() if is_writer else None)  # a writer's are the run's, then
    named = {i: f"tokenizer of {folders[0]}" for i in sorted(theirs.eos_ids)} | named
    return _ModelEnds(named, find_turn_end(theirs), theirs.pieces())


def _load_or_none(folder: Path) -> Tokenizer | None:
    try:
        return load_tokenizer(folder)
    except UserError:
        return None


def _other_ends(recipe: Recipe, role: str, tokenizer: Tokenizer) -> _ModelEnds | None:
    """Return the other model's ids, if the recipe names it and it is at hand."""
    model: ModelConfig = getattr(recipe, role)
    if not (model.hf_path or model.checkpoint):
        return None
    try:
        return _model_ends(recipe, role, tokenizer, is_writer=False)
    except UserError as error:
        logger.warning("the %s's end-of-text ids are not known: %s", role, error)
        return None


def _agreeing(model: _ModelEnds, role: str, pieces: dict[int, str]) -> dict[int, str]:
    """Return a model's ids that are the same piece in the run's vocabulary, and log which are not."""
    agreeing = {}
    for i, origin in model.ids.items():
        if model.pieces is not None and i in pieces and model.pieces.get(i) == pieces[i]:
            agreeing[i] = origin
            continue
        here = f"{pieces[i]!r} in the run's vocabulary" if i in pieces else "beyond the run's vocabulary"
        there = f"{model.pieces.get(i)!r} in the {role}'s" if model.pieces else "unknown without a tokenizer there"
        logger.warning("the %s's end-of-text id %d (%s) ends no response: %s, %s", role, i, origin, here, there)
    return agreeing


def _end_alike(one: _ModelEnds, other: _ModelEnds) -> bool:
    return one.is_complete and other.is_complete and one.named.keys() == other.named.keys()


def _event(ids: set[int], ours: dict[int, str], theirs: dict[int, str]) -> tuple[int, ...]:
    """Return the ids at which both vocabularies have the same piece, if they are several."""
    same = sorted(i for i in ids if i in ours and ours[i] == theirs.get(i))
    return tuple(same) if len(same) > 1 else ()
