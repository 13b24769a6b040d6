"""The prompts of one or more data files: each row is checked once at the start, and read and tokenized when drawn.

Memory holds an id and a few numbers per row, so a million rows neither fill it nor delay the first step. Rows that
could be refused are tokenized at the start: all rows of a small set; of a large set, rows that may be too long (a token
covers at least one byte), and one row per sequence of roles, because templates refuse some.

    prompts = PromptSet("prompts.parquet", tokenizer, max_tokens=1024)
    prompts[0].tokens, prompts.longest
"""

from __future__ import annotations

import hashlib
import logging
import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from megatron_tropd.config import ColumnsConfig, DataConfig
from megatron_tropd.data.files import Rows, open_data
from megatron_tropd.data.layouts import RowReader
from megatron_tropd.data.problems import Problems
from megatron_tropd.data.text import TextRows
from megatron_tropd.prompts.digests import digests, to_json
from megatron_tropd.rounding import ceil_div
from megatron_tropd.system.launcher import launcher_rank
from megatron_tropd.types import Prompt, UserError

logger = logging.getLogger(__name__)

_SMALL = 2000  # sets of up to this many rows are tokenized at once and keep their tokens
_LONGEST = 512  # rows of the greatest size among which the longest prompt of a large set is looked for
_SAMPLE = 32  # rows by which the template's own tokens are measured
_TEMPLATE_MARGIN = 256  # tokens beyond those, such as a longer header for rare roles


class PromptEncoder(Protocol):
    """The part of tokenizer.Tokenizer that is needed here."""

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Return the templated token ids."""


class PromptSet(Sequence):
    """The usable rows of data files as Prompts; `problems` describes the others.

    Attributes:
        problems: of rows, by file and line.
        cut: rows whose teacher response was cut at its token limit.
        duplicates: rows whose prompt repeats an earlier one.
        too_long: rows longer than the limit.
        part_lengths: usable rows per entry of the recipe's list of files.
        longest: tokens of the longest prompt; of a large set, of its 512 greatest rows in bytes.
    """

    def __init__(
        self,
        spec: str | Path | list[str],
        tokenizer: PromptEncoder | None,
        *,
        key: str = "data.prompts",
        data: DataConfig | None = None,
        max_tokens: int | None = None,
        require: tuple[str, ...] = (),
        exact_above: int | None = None,
    ):
        """Open and check the files; whether there are problems is the caller's to ask (`problems.raise_if_any`).

        Args:
            spec: a path, a glob or a list of them.
            tokenizer: encodes prompts; None: only the structure is checked.
            key: of the recipe, which names the files; columns that the recipe names must be there for data.prompts,
                and are taken where they are there for other files.
            data: `data.*`: columns, assistant_turn, skip_long_prompts, deduplicate.
            max_tokens: longest prompt; longer ones are problems, or are skipped (data.skip_long_prompts).
            require: `answer` or `teacher_response`, which every row must have.
            exact_above: `longest` is exact from here on for large sets, too.

        Raises:
            UserError: a file cannot be read, or holds no rows.
        """
        self.key, self._data, self._max_tokens = key, data or DataConfig(), max_tokens
        self._tokenizer, self._require = tokenizer, require
        self.problems, self.duplicates, self.too_long, self.longest, self.cut = Problems(), 0, 0, 0, 0
        self._parts = open_data(spec, key)
        self.files = [rows for part in self._parts for rows in part]
        self.readers = [self._reader(rows) for rows in self.files]  # of the check, which counts what it understands
        self._again = [reader.again() for reader in self.readers]
        self._prefixes = [self._prefix(rows) for rows in self.files]
        self._file, self._place, self._size, self._shape = array("L"), array("L"), array("L"), array("L")
        self._contents, self._digests = array("Q"), array("Q")
        self._ids: list[str] = []
        self._without_response: list[str] = []
        self._shapes: dict[tuple, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self._refused: set[int] = set()  # by the template
        self._check_rows()
        self._used = self._without_duplicates()
        if tokenizer is not None and len(self._ids):
            self._used = self._check_lengths(exact_above)
        self.part_lengths = self._count_parts()

    def __len__(self) -> int:
        return len(self._used)

    def __getitem__(self, place: int) -> Prompt:  # type: ignore[override]  # no slices: they would be read whole
        """Return a Prompt with its tokens; UserError if the template refuses it only now."""
        row = int(self._used[range(len(self))[place]])
        prompt = replace(self._prompt(row), index=place)
        try:
            prompt.tokens = self._encode(row, prompt)
        except ValueError as error:
            raise UserError(f"{prompt.row}: {error}.") from error
        return prompt

    def __iter__(self) -> Iterator[Prompt]:
        return (self[place] for place in self._progress(range(len(self)), len(self), "read"))

    @property
    def deduplicates(self) -> bool:
        """Whether `duplicates` are left out."""
        return self._data.deduplicate

    @property
    def responses(self) -> int:
        """Well-formed rows that carry a teacher response."""
        return len(self._ids) - len(self._without_response)

    @property
    def ids_without_response(self) -> list[str]:
        """Ids of the usable rows that carry no teacher response."""
        if len(self) == len(self._ids):
            return self._without_response
        used = {self._ids[row] for row in self._used}
        return [name for name in self._without_response if name in used]

    def untokenized(self, place: int) -> Prompt:
        """Return a Prompt without its tokens."""
        return replace(self._prompt(int(self._used[place])), index=place)

    def fingerprint(self) -> list[dict[str, Any]]:
        """Return name, number of usable rows and digest of their contents, per file."""
        files, digests = np.asarray(self._file)[self._used], np.asarray(self._digests)[self._used]
        return [
            {
                "name": Path(rows.path).name,
                "rows": int((files == i).sum()),
                "digest": hashlib.sha256(digests[files == i].astype("<u8").tobytes()).hexdigest(),
            }
            for i, rows in enumerate(self.files)
        ]

    def sample(self, count: int) -> Iterator[Prompt]:
        """Yield up to `count` well-formed rows, evenly spread, too long ones included; with tokens if they have any."""
        rows = range(0, len(self._ids), ceil_div(len(self._ids), count) or 1)
        for row in self._progress(rows, len(rows), "tokenize"):
            prompt = self._prompt(row)
            try:
                prompt.tokens = self._encode(row, prompt)
            except ValueError:  # one of `problems`
                continue
            yield prompt

    def _reader(self, rows: Rows) -> RowReader:
        columns = self._data.columns
        if self.key != "data.prompts":
            columns = _present(columns, rows)
        elif rows.columns is not None:
            _refuse_missing(columns, rows, rows.columns)
        reader = RowReader(columns, self._data.assistant_turn, self._require)
        reader.file_columns = rows.columns
        if rows.columns is not None:
            rows.select(reader.names(rows.columns))
        return reader

    def _check_rows(self) -> None:
        row_of_id: dict[str, int] = {}
        total = sum(map(len, self.files))
        for i, rows, place, record in self._progress(self._scan(), total, "check"):
            number = rows.number(place)
            try:
                if isinstance(record, ValueError):
                    raise record
                prompt = self.readers[i].read(record, f"{self._prefixes[i]}{number}")
                first = row_of_id.setdefault(prompt.id, len(self._ids))
                if first != len(self._ids):
                    other = self.files[self._file[first]]
                    where = "" if other is rows else f" of {other.path}"
                    raise ValueError(
                        f"id {prompt.id!r} is taken by {other.unit} {other.number(self._place[first])}{where}"
                    )
            except ValueError as error:
                self.problems.add(rows.path, rows.unit, number, str(error))
                continue
            self._add(i, place, prompt)
        for rows, reader in zip(self.files, self.readers, strict=True):
            if rows.columns is None and reader.fields:
                _refuse_missing(reader.columns, rows, reader.fields)
        if not self._ids and not self.problems:
            paths = ", ".join(rows.path for rows in self.files)
            raise UserError(f"{paths} holds no prompts; expected rows with `messages`, `text` or `prompt`.")

    def _scan(self) -> Iterator[tuple[int, Rows, int, Any]]:
        for i, rows in enumerate(self.files):
            yield from ((i, rows, place, record) for place, record in rows.scan())

    def _add(self, file: int, place: int, prompt: Prompt) -> None:
        content, digest, contents = digests(prompt)
        tools = 3 * len(to_json(prompt.tools)) if prompt.tools else 0  # templates indent them
        self._file.append(file)
        self._place.append(place)
        self._size.append(content + tools)
        self._contents.append(contents)
        self._digests.append(digest)
        self._ids.append(prompt.id)
        if prompt.teacher_response is None:
            self._without_response.append(prompt.id)
        elif prompt.teacher_finish_reason == "length":
            self.cut += 1
        roles = tuple([message["role"] for message in prompt.messages or ()])
        shape = (roles, prompt.tools is None, tuple(prompt.chat_template_kwargs or ()))
        self._shape.append(self._shapes.setdefault(shape, len(self._shapes)))

    def _prefix(self, rows: Rows) -> str:
        """Return the prefix of the ids of rows without an id."""
        if len(self.files) == 1:
            return ""
        name = Path(rows.path).name
        shared = sum(Path(other.path).name == name for other in self.files) > 1
        return f"{rows.path if shared else name}:"

    def _without_duplicates(self) -> np.ndarray:
        contents = np.asarray(self._contents)
        firsts = np.sort(np.unique(contents, return_index=True)[1]) if len(contents) else np.arange(0)
        self.duplicates = len(contents) - len(firsts)
        return firsts if self._data.deduplicate else np.arange(len(contents))

    def _check_lengths(self, exact_above: int | None) -> np.ndarray:
        """Tokenize the rows that could be refused; return the rows that are used."""
        lengths: dict[int, int] = {}
        used, sizes = self._used, np.asarray(self._size, dtype=np.int64)
        if len(used) <= _SMALL:
            self._measure(used, lengths, keeps=True)
        else:
            shapes = np.asarray(self._shape)[used]
            firsts = used[np.unique(shapes, return_index=True)[1]]
            refused = self._measure(firsts, lengths)
            self._measure(used[np.isin(shapes, np.asarray(self._shape)[refused])] if refused else [], lengths)
            sample = used[:: ceil_div(len(used), _SAMPLE)]
            self._measure(sample, lengths)
            template = max([0, *(lengths[row] - int(sizes[row]) for row in map(int, sample) if row in lengths)])
            limit = min((n for n in (self._max_tokens, exact_above) if n is not None), default=None)
            bounds = sizes[used] + template + _TEMPLATE_MARGIN
            greatest = used[np.argsort(-sizes[used], kind="stable")[:_LONGEST]]
            candidates = greatest if limit is None else np.union1d(greatest, used[bounds > limit])
            self._measure(candidates, lengths)
        limit = self._max_tokens
        too_long = {row for row, length in lengths.items() if limit is not None and length > limit}
        self.too_long = len(too_long)
        if not self._data.skip_long_prompts:
            for row in sorted(too_long):
                self._add_problem(row, f"the prompt has {lengths[row]} tokens, more than the {limit} allowed", True)
        self.longest = max((length for row, length in lengths.items() if row not in too_long), default=0)
        return used[~np.isin(used, np.fromiter(too_long, np.int64, len(too_long)))]

    def _measure(self, rows: Iterable[int], lengths: dict[int, int], keeps: bool = False) -> list[int]:
        """Tokenize rows into `lengths`; return those that the template refuses, which become problems."""
        assert self._tokenizer is not None  # without one nothing is measured
        todo, refused = [row for row in map(int, rows) if row not in lengths and row not in self._refused], []
        for row in self._progress(todo, len(todo), "tokenize"):
            try:
                tokens = self._tokenizer.encode_prompt(self._prompt(row))
            except ValueError as error:
                self._add_problem(row, str(error))
                refused.append(row)
                self._refused.add(row)
                continue
            lengths[row] = len(tokens)
            if keeps:
                self._tokens[row] = tokens
        return refused

    def _add_problem(self, row: int, message: str, is_length: bool = False) -> None:
        rows = self.files[self._file[row]]
        self.problems.add(rows.path, rows.unit, rows.number(self._place[row]), message, is_length)

    def _prompt(self, row: int) -> Prompt:
        i, place = self._file[row], self._place[row]
        rows = self.files[i]
        number = rows.number(place)
        prompt = self._again[i].read(rows.read(place), f"{self._prefixes[i]}{number}")
        prompt.row = f"{rows.path}:{number}"
        return prompt

    def _encode(self, row: int, prompt: Prompt) -> list[int]:
        if self._tokenizer is None:
            return []
        return self._tokens[row] if row in self._tokens else self._tokenizer.encode_prompt(prompt)

    def _count_parts(self) -> list[int]:
        parts = [i for i, part in enumerate(self._parts) for _ in part]
        counts = Counter(parts[file] for file in np.asarray(self._file)[self._used].tolist()) if self._ids else {}
        return [counts.get(i, 0) for i in range(len(self._parts))]

    def _progress(self, items: Iterable, total: int, verb: str) -> Iterable:
        """Show a bar for what takes more than two seconds, on the first rank's terminal."""
        hides = launcher_rank() > 0 or not sys.stderr.isatty()
        return tqdm(items, f"{verb} {self.key}", total, unit="row", delay=2.0, disable=hides, leave=False)


def _missing(columns: ColumnsConfig, present: Iterable[str]) -> list[tuple[str, str]]:
    """Return the (role, name) of the recipe's columns that are not among `present`."""
    present = set(present)
    return [(role, name) for role, name in vars(columns).items() if name and not {name, name.split(".")[0]} & present]


def _refuse_missing(columns: ColumnsConfig, rows: Rows, present: list[str]) -> None:
    for role, name in _missing(columns, present):
        raise UserError(f"data.columns.{role}={name}: {rows.path} has no such column; it has {', '.join(present)}.")


def _present(columns: ColumnsConfig, rows: Rows) -> ColumnsConfig:
    """Return the recipe's columns without those that these rows, perhaps of another layout, do not have."""
    if isinstance(rows, TextRows):
        first = next((record for _, record in rows.scan() if isinstance(record, dict)), {})
        return replace(columns, **{role: None for role, _ in _missing(columns, first)})
    return replace(columns, **{role: None for role, _ in _missing(columns, rows.columns or ())})
