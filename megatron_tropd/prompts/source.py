"""Prompts from data files, and the order in which training draws them.

A row has `messages` (chat), `text` (raw) or `prompt` (a string: one user message), optionally `id` (default: the line's
number), `answer` (for evaluation), `teacher_response`, `tools`; data/layouts.py lists the other layouts that are
recognised. Broken rows are reported by file and line, up to ten at a time, before anything is trained.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tropd.config import DataConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts.digests import digests
from megatron_tropd.prompts.prompt_set import PromptEncoder, PromptSet
from megatron_tropd.types import Prompt


def load_prompts(
    path: str | Path | list[str],
    tokenizer: PromptEncoder,
    max_tokens: int | None = None,
    require: tuple[str, ...] = (),
    *,
    key: str = "data.prompts",
    data: DataConfig | None = None,
    length_remedy: str = "raise data.max_prompt_tokens",
) -> list[Prompt]:
    """Read and tokenize prompt files whole; `index` counts their prompts from 0.

    `require` names optional fields (`answer`, `teacher_response`) that every row must have; `key` is the recipe's key
    that names the files, and `data` its `data.*`. Raises UserError with file and line numbers for what cannot be read,
    is empty, is named twice, or has more than `max_tokens` tokens, with `length_remedy` for the last.
    """
    prompts = PromptSet(path, tokenizer, key=key, data=data, max_tokens=max_tokens, require=require)
    prompts.problems.raise_if_any(length_remedy)
    return list(prompts)


def evaluation_data(data: DataConfig | None) -> DataConfig:
    """Return `data.*` for evaluation files: all of their rows count, whatever is left out of training."""
    return replace(data or DataConfig(), skip_long_prompts=False, deduplicate=False)


class PromptSource:
    """Endless prompts in an order that is a pure function of (seed, epoch, weights); its state is a few numbers."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        seed: int = 0,
        shuffle: bool = True,
        weights: Sequence[float] = (),
        parts: Sequence[int] = (),
    ):
        """Draw from `prompts`; with `weights`, from consecutive parts of it in these proportions.

        Args:
            prompts: a list, or a PromptSet, whose prompts are read and tokenized as they are drawn.
            seed: of the order.
            shuffle: False: the order of the files.
            weights: one positive number per part; empty: each prompt once per epoch.
            parts: number of prompts per part.
        """
        self.prompts, self.seed, self.shuffle = prompts, seed, shuffle
        self.weights = [float(weight) for weight in weights]
        self._lengths = list(parts) if weights else [len(prompts)]
        self.cursor = 0  # prompts handed out so far
        self._drawn = [0] * len(self._lengths)  # by part
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # part -> epoch and its order
        self._files: list[dict[str, Any]] | None = None

    def next(self, count: int, rank: int = 0, world_size: int = 1) -> list[Prompt]:
        """Return the next `count` prompts of the global order, or rank `rank`'s contiguous share of them.

        The order is the same on every rank, and only the share is tokenized. `index` runs on over epochs.
        """
        places = [self._draw() for _ in range(count)]
        share = count // world_size
        mine = range(rank * share, (rank + 1) * share)
        drawn = [replace(self.prompts[places[i]], index=self.cursor + i) for i in mine]
        self.cursor += count
        return drawn

    def _draw(self) -> int:
        """Return the place of the next prompt."""
        part = self._next_part() if self.weights else 0
        epoch, place = divmod(self._drawn[part], self._lengths[part])
        if self._orders.get(part, (None,))[0] != epoch:
            self._orders[part] = (epoch, self._permutation(part, epoch))
        self._drawn[part] += 1
        return sum(self._lengths[:part]) + int(self._orders[part][1][place])

    def _next_part(self) -> int:
        """Return the part that is furthest behind its share: after n prompts each is within one of weight * n."""
        ahead = sum(self._drawn) + 1
        total = sum(self.weights)
        behind = [weight / total * ahead - drawn for weight, drawn in zip(self.weights, self._drawn, strict=True)]
        return behind.index(max(behind))

    def _permutation(self, part: int, epoch: int) -> np.ndarray:
        length = self._lengths[part]
        if not self.shuffle:
            return np.arange(length)
        # random.Random promises one stream of random() for a seed on every Python version; shuffle() promises nothing.
        generator = random.Random(f"{self.seed}/{epoch}/{part}" if self.weights else f"{self.seed}/{epoch}")
        keys = np.fromiter((generator.random() for _ in range(length)), np.float64, length)
        return keys.argsort(kind="stable")

    def state_dict(self) -> dict[str, Any]:
        """What an exact resume needs: how many prompts were drawn, and what the order and the prompts depend on."""
        if self._files is None:
            self._files = _fingerprint(self.prompts)
        settings = {"seed": self.seed, "shuffle": self.shuffle, "weights": self.weights}
        return {"cursor": self.cursor, "drawn": list(self._drawn), **settings, "files": self._files}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; UserError names the file or key that is not what it was."""
        ours = self.state_dict()
        if not isinstance(state.get("files"), list):
            raise UserError(
                "the checkpoint was written by an earlier version, which noted only the ids of data.prompts: whether "
                f"its prompts are the same cannot be told. {_REMEDY}"
            )
        changed = _changed_files(state["files"], ours["files"])
        if changed:
            raise _has_changed("data.prompts", changed)
        for key in ("seed", "shuffle", "weights"):
            if state[key] != ours[key]:
                raise _has_changed(f"data.{key}", f"it was {state[key]} and is {ours[key]}")
        self.cursor, self._drawn = int(state["cursor"]), [int(count) for count in state["drawn"]]


_REMEDY = "Start a new run with checkpoint.resume=false or another checkpoint.dir."


def _has_changed(key: str, detail: str) -> UserError:
    return UserError(
        f"{key} has changed since the checkpoint was written ({detail}), so the run cannot resume exactly. Restore it. "
        f"{_REMEDY.replace('Start', 'Or start')}"
    )


def _changed_files(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """Return what differs, by file; "" if nothing does. A file may have moved or changed its format."""
    if len(before) != len(now):
        names = [", ".join(str(file["name"]) for file in files) for files in (before, now)]
        return f"the files were {names[0]} and are {names[1]}"
    differences = []
    for old, new in zip(before, now, strict=True):
        if old["digest"] != new["digest"]:
            name = new["name"] if old["name"] == new["name"] else f"{new['name']}, before {old['name']}"
            rows = (
                f"{old['rows']} usable rows before, {new['rows']} now"
                if old["rows"] != new["rows"]
                else "other content"
            )
            differences.append(f"{name}: {rows}")
    return "; ".join(differences)


def _fingerprint(prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    if isinstance(prompts, PromptSet):
        return prompts.fingerprint()
    joined = b"".join(digests(prompt)[1].to_bytes(8, "little") for prompt in prompts)
    return [{"name": "prompts", "rows": len(prompts), "digest": hashlib.sha256(joined).hexdigest()}]
