"""Opens data files of any format as rows that know their origin; local files only, nothing is downloaded or run.

Parquet, Arrow and `save_to_disk` folders are opened through Hugging Face's `datasets`, which maps them into memory;
JSONL, JSON, CSV and TSV by data/text.py. The format follows from a file's first bytes, then from its name.

    for entry in open_data(["math/*.parquet", "chat.jsonl"], key="data.prompts"):
        for rows in entry: ...
"""

from __future__ import annotations

import glob
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_tropd.data.text import open_text
from megatron_tropd.errors import UserError
from megatron_tropd.system.launcher import launcher_rank

logger = logging.getLogger(__name__)

_BATCH = 1000  # rows of a columnar file that are converted at once
_LARGE_BYTES = 1 << 28  # a conversion from here on shows its progress


Reader = Callable[[int, int], Any]  # returns the rows [start, stop) as a pyarrow.Table


class Rows(Protocol):
    """The rows of one file."""

    path: str
    format: str
    unit: str  # what `number` counts: "line" or "row"

    @property
    def columns(self) -> list[str] | None:
        """The columns' names; None where each row has its own."""

    def __len__(self) -> int: ...

    def number(self, place: int) -> int:
        """Return the row's line or number in the file, counted from 1."""

    def read(self, place: int) -> dict[str, Any]:
        """Return a row; ValueError names what is wrong with it."""

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """Yield each place with its row, or with what is wrong with it."""

    def select(self, names: set[str]) -> None:
        """Read only these columns from now on."""


def open_data(spec: str | Path | list[str], key: str) -> list[list[Rows]]:
    """Open the files of one path or glob, or of a list of them; one list of rows per entry.

    Raises:
        UserError: naming `key` where nothing matches, else the file that cannot be read.
    """
    entries = spec if isinstance(spec, list) else [spec]
    return [[_open(path, key) for path in _matches(str(entry), key)] for entry in entries]


def matches(entry: str | Path) -> list[Path]:
    """Expand `~` and globs; return the paths, none if nothing matches a glob."""
    path = Path(entry).expanduser()
    if path.exists() or not glob.has_magic(str(entry)):
        return [path]
    return [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]


def _matches(entry: str, key: str) -> list[Path]:
    if "://" in entry:
        raise UserError(f"{key}={entry}: only local files are read; download it first and give its path.")
    found = matches(entry)
    if not found:
        raise UserError(f"{key}={entry}: no file matches the pattern; give the path of a data file.")
    return found


def _open(path: Path, key: str) -> Rows:
    if path.is_dir():
        return _open_folder(path, key)
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give the path of a JSONL, JSON, CSV, Parquet or Arrow file in "
            f"{key}."
        ) from error
    suffix = path.suffix.lower()
    if head.startswith(b"PAR1"):
        return ColumnRows(path, "Parquet", _guarded(path, "Parquet", lambda: _Parquet(path)))
    if head.startswith(b"ARROW1") or (suffix == ".arrow" and head):
        return ColumnRows(path, "Arrow", _guarded(path, "Arrow", lambda: _Mapped(_map_arrow(path))))
    if suffix in (".parquet", ".feather"):
        open_text(path)  # refuses what a Git LFS pointer is
        raise UserError(f"{path} does not begin as a {suffix[1:]} file does; copy it again, or give it its own name.")
    return open_text(path)


def _open_folder(path: Path, key: str) -> Rows:
    import datasets

    if (path / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        if len(splits) != 1:
            raise UserError(
                f"{key}={path} holds the splits {', '.join(splits) or 'none'}: name one, as in {key}={path}/"
                f"{splits[0] if splits else 'train'}."
            )
        path = path / splits[0]
    if not (path / "state.json").is_file():
        suffixes = sorted({p.suffix for p in path.iterdir() if p.is_file() and p.suffix})
        hint = f"its files by a pattern, such as {path}/*{suffixes[0]}" if suffixes else "a file"
        raise UserError(f"{key}={path} is a folder that `save_to_disk` did not write; give {hint}.")
    dataset = _guarded(path, "datasets folder", lambda: datasets.load_from_disk(str(path)))
    return ColumnRows(path, "datasets folder", _Mapped(dataset))


def _guarded(path: Path, format: str, read: Callable[[], Any]) -> Any:
    """Return read(); whatever pyarrow and `datasets` raise about a file becomes one line about it."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise UserError(f"{path} cannot be read as {format} ({reason}); write it again.") from error


def _map_arrow(path: Path) -> Any:
    """Map an Arrow file (Feather is one) or stream into memory; compressed buffers are unpacked there."""
    import datasets
    import pyarrow
    from datasets.table import InMemoryTable

    source = pyarrow.memory_map(str(path))
    try:
        table = pyarrow.ipc.open_file(source).read_all()
    except pyarrow.ArrowInvalid:
        return datasets.Dataset.from_file(str(path))
    return datasets.Dataset(InMemoryTable(table))


def _reader(dataset: Any) -> Reader:
    by_table = dataset.with_format("arrow")
    return lambda start, stop: by_table[start:stop]


class _Mapped:
    """A dataset that is mapped into memory as it is."""

    def __init__(self, dataset: Any):
        self._dataset, self.columns = dataset, dataset.column_names

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, names: list[str]) -> Reader:
        return _reader(self._dataset.select_columns(names))


class _Parquet:
    """A Parquet file: its columns are converted to Arrow in the cache of `datasets`, once, when they are asked for."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            self.columns, self._rows = file.schema_arrow.names, file.metadata.num_rows
        self._path = path

    def __len__(self) -> int:
        return self._rows

    def take(self, names: list[str]) -> Reader:
        import datasets
        import pyarrow.parquet

        if not self._rows:  # `datasets` fails at it
            return lambda start, stop: pyarrow.table({name: [] for name in names})
        stat = self._path.stat()
        # `datasets` knows a file by its name and time. The folder tells apart what was written within one tick, and by
        # the time of the inode what a copy put there with the time of another file.
        version = "-".join(f"{number:x}" for number in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))
        cache = Path(datasets.config.HF_DATASETS_CACHE) / "megatron_tropd" / version
        name = glob.escape(str(self._path.resolve()))
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _progress(datasets, stat.st_size > _LARGE_BYTES):  # a lock lets the first of several ranks convert
                return _reader(datasets.Dataset.from_parquet(name, cache_dir=str(cache), columns=names))
        except Exception as error:
            table = pyarrow.parquet.read_table(self._path, columns=names)  # raises what is wrong with the file itself
            reason = _no_cache(error)
            if reason is None:
                logger.warning(
                    "%s: %s; each process holds the columns in memory", self._path, " ".join(str(error).split())
                )
            else:
                logger.warning(
                    "%s: no cache can be written in %s (%s), so each process holds the columns in memory; set "
                    "HF_DATASETS_CACHE to a folder with room",
                    *(self._path, datasets.config.HF_DATASETS_CACHE, reason),
                )
            return lambda start, stop: table.slice(start, stop - start)


def _no_cache(error: BaseException | None) -> str | None:
    """Return why a cache cannot be written, if that is what an exception is about."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


class _progress:
    """The bars of `datasets` are shown by one rank, on a terminal, for what takes long."""

    def __init__(self, datasets: Any, is_long: bool):
        self._datasets = datasets
        self._hides = not (is_long and sys.stderr.isatty() and launcher_rank() == 0)

    def __enter__(self) -> None:
        self._hides = self._hides and not self._datasets.utils.are_progress_bars_disabled()
        if self._hides:
            self._datasets.disable_progress_bars()

    def __exit__(self, *exception: object) -> None:
        if self._hides:
            self._datasets.enable_progress_bars()


class ColumnRows:
    """The rows of a columnar file."""

    unit = "row"

    def __init__(self, path: Path, format: str, table: Any):
        """Wrap a _Mapped or a _Parquet."""
        self.path, self.format = str(path), format
        self.columns: list[str] = list(table.columns)
        self._table = table
        self._data: Reader | None = None  # set once columns are selected

    def __len__(self) -> int:
        return len(self._table)

    def number(self, place: int) -> int:
        """Return the row's number, counted from 1."""
        return place + 1

    def select(self, names: set[str]) -> None:
        """Read only these columns from now on."""
        chosen = [name for name in self.columns if name in names]
        if chosen:
            self._data = _guarded(Path(self.path), self.format, lambda: self._table.take(chosen))

    def read(self, place: int) -> dict[str, Any]:
        """Return a row; ValueError names what is wrong with it."""
        try:
            return _rows_of(self._data(place, place + 1))[0] if self._data is not None else {}
        except Exception as error:  # what pyarrow raises for a string that is not UTF-8 is a ValueError, too
            raise ValueError(" ".join(str(error).split())) from error

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """Yield each place with its row, or with what is wrong with it."""
        for start in range(0, len(self), _BATCH):
            places = range(start, min(start + _BATCH, len(self)))
            rows: Sequence[dict[str, Any] | ValueError]
            try:
                rows = (
                    _rows_of(self._data(places.start, places.stop)) if self._data is not None else [{} for _ in places]
                )
            except Exception:  # find the row that it is
                rows = [self._try(place) for place in places]
            yield from zip(places, rows, strict=True)

    def _try(self, place: int) -> dict[str, Any] | ValueError:
        try:
            return self.read(place)
        except ValueError as error:
            return error


def _rows_of(table: Any) -> list[dict[str, Any]]:
    rows = table.to_pylist()
    if any(_may_hold_nulls(chunk) for column in table.columns for chunk in column.chunks):
        return [_without_nulls(row) for row in rows]
    return rows


def _may_hold_nulls(array: Any) -> bool:
    """Return whether an Arrow array holds a null at any depth, or may hold numbers that are none."""
    import pyarrow.types as types

    kind = array.type
    if array.null_count or types.is_floating(kind):
        return True
    if types.is_struct(kind):
        return any(_may_hold_nulls(field) for field in array.flatten())
    if types.is_list(kind) or types.is_large_list(kind):
        return _may_hold_nulls(array.flatten())
    return types.is_nested(kind) or types.is_dictionary(kind) or types.is_null(kind)


def _without_nulls(value: Any) -> Any:
    """Leave out the fields of objects that are null or not a number: a column's rows share their fields and types."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None and item == item}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
