"""Rows of JSONL, JSON, CSV and TSV files, plain or compressed: indexed by byte range, parsed one at a time.

Python's own parsers keep each value as it was written: a library that reads into columns gives all rows of a column
one type, which turns the answer "007" into 7 and fills the objects of a tool's schema with nulls.

    rows = open_text("prompts.jsonl")
    rows.read(0), rows.number(0)       # the first row as a dictionary, and the line where it begins
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import sys
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tropd.errors import UserError

_Open = Callable[[BinaryIO], io.BufferedIOBase]
_COMPRESSED: dict[bytes, _Open] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
_LIST_KEYS = ("data", "rows", "examples", "instances")  # of a JSON object around the list of rows


class TextRows:
    """The rows of a text file; only their places in the file are held in memory."""

    def __init__(self, path: Path, format: str, file: BinaryIO, parse: Callable[[str], dict[str, Any]]):
        """Describe an empty index over the open `file`; `parse` turns a row's text into a dictionary."""
        self.path, self.format, self.columns = str(path), format, None
        self._file, self._parse = file, parse
        self._starts, self._ends, self._numbers = array("Q"), array("Q"), array("Q")
        self.unit = "line"  # or "row", where several begin in one

    def add(self, start: int, end: int, number: int) -> None:
        """Add the row at bytes [start, end) that begins in line `number`, counted from 1."""
        if self._numbers and self._numbers[-1] == number:
            self.unit = "row"
        self._starts.append(start)
        self._ends.append(end)
        self._numbers.append(number)

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, place: int) -> int:
        """Return the line in which the row begins, or its number where several rows begin in one; counted from 1."""
        return self._numbers[place] if self.unit == "line" else place + 1

    def read(self, place: int) -> dict[str, Any]:
        """Return a row; ValueError names what is wrong with it."""
        start = self._starts[place]
        raw = os.pread(self._file.fileno(), self._ends[place] - start, start)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(_not_utf8(error, start)) from error
        return self._parse(text)

    def scan(self) -> Iterator[tuple[int, dict[str, Any] | ValueError]]:
        """Yield each place with its row, or with what is wrong with it."""
        for place in range(len(self)):
            try:
                yield place, self.read(place)
            except ValueError as error:
                yield place, error

    def select(self, names: set[str]) -> None:
        """Read only these columns: text rows are parsed whole, so there is nothing to do."""


def open_text(path: Path) -> TextRows:
    """Index a text file, whose format is told by its content first and by its name second.

    Raises:
        UserError: it cannot be read, decompressed or decoded, or has no form that is known here.
    """
    file = _uncompressed(path)
    offset = _skip_byte_order_mark(path, file)
    suffix = _text_suffix(path)
    if suffix in (".csv", ".tsv"):
        return _index_table(path, file, offset, suffix)
    if suffix == ".json" or _first_byte(file, offset) == b"[":
        rows = _index_document(path, file, offset)
        if rows is not None:
            return rows
    return _index_lines(path, file, offset)


def parse_object(text: str) -> dict[str, Any]:
    """Return a JSON object; ValueError for anything else, and for a key that an object holds twice."""
    try:
        record = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply to be read") from error
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__}, expected an object")
    return record


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object, and only one of its values could be used")
    return record


def _uncompressed(path: Path) -> BinaryIO:
    """Open a file; a compressed one is unpacked into a nameless temporary file, which this process alone sees."""
    try:
        file = open(path, "rb")  # noqa: SIM115  (rows are read from it as long as they live)
        head = file.read(6)
        file.seek(0)
        opener = next((o for magic, o in _COMPRESSED.items() if head.startswith(magic)), None)
        if opener is None:
            if head.startswith(b"\x28\xb5\x2f\xfd"):
                raise UserError(f"{path}: zstd is not read here; unpack it with `unzstd {path}`.")
            if head.startswith(b"PK\x03\x04"):
                raise UserError(f"{path}: zip archives are not read here; unpack it with `unzip {path}`.")
            return file
        unpacked = tempfile.TemporaryFile()  # noqa: SIM115
        with file, opener(file) as packed:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
        unpacked.seek(0)
        if unpacked.read(4) == b"PAR1":
            raise UserError(f"{path} is a compressed Parquet file, which cannot be mapped; unpack it.")
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is a damaged archive ({error}); copy or compress it again.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); give the path of a data file.") from error
    unpacked.seek(0)
    return unpacked


def _text_suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".bz2", ".xz"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _skip_byte_order_mark(path: Path, file: BinaryIO) -> int:
    """Return where the text begins; UserError for UTF-16 and UTF-32, and for a Git LFS pointer in a file's place."""
    head = file.read(64)
    file.seek(0)
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the data; run `git lfs pull` in its repository.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:4]:
        raise UserError(
            f"{path} is UTF-16 or UTF-32 text, expected UTF-8; convert it with `iconv -f UTF-16 -t UTF-8 {path}`."
        )
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _not_utf8(error: UnicodeDecodeError, start: int) -> str:
    return (
        f"not UTF-8 ({error.reason} at byte {start + error.start + 1} of the file); if it is Latin-1, convert the file "
        "with `iconv -f LATIN1 -t UTF-8`"
    )


def _first_byte(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return next((line.lstrip()[:1] for line in file if line.strip()), b"")


def _index_lines(path: Path, file: BinaryIO, offset: int) -> TextRows:
    rows = TextRows(path, "JSONL", file, parse_object)
    file.seek(offset)
    for number, line in enumerate(file, start=1):  # a binary file's lines end at \n alone: U+2028 is text
        if line.strip():
            rows.add(offset, offset + len(line), number)
        offset += len(line)
    return rows


def _index_document(path: Path, file: BinaryIO, offset: int) -> TextRows | None:
    """Index a JSON document: a list of rows, {"data": [...]} or one row; None where each line is a document."""
    file.seek(offset)
    raw = file.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: {_not_utf8(error, offset)}") from error
    scanner = _Scanner(path, text)
    if scanner.peek() != "[" and _is_json(text.lstrip().split("\n", 1)[0]) and "\n" in text.strip():
        return None
    rows = TextRows(path, "JSON", file, parse_object)
    end_of_last, bytes_before, line = 0, offset, 1
    for start, end in scanner.elements():
        bytes_before += len(text[end_of_last:start].encode())
        line += text.count("\n", end_of_last, start)
        length = len(text[start:end].encode())
        rows.add(bytes_before, bytes_before + length, line)
        bytes_before, end_of_last = bytes_before + length, end
        line += text.count("\n", start, end)
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Scanner:
    """Finds where the elements of a JSON document's list of rows lie."""

    def __init__(self, path: Path, text: str):
        self._path, self._text, self._place = path, text, 0
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Return the next character that is not blank, without taking it; "" at the end."""
        text, place = self._text, self._place
        while place < len(text) and text[place] in " \t\r\n":
            place += 1
        self._place = place
        return text[place : place + 1]

    def elements(self) -> Iterator[tuple[int, int]]:
        """Yield the [start, end) of each row."""
        start, is_object = self._place, self.peek() == "{"
        if is_object and not self._find_list():
            self._place = start
            yield self._value()
        else:
            yield from self._list()
            while is_object and self.peek() == ",":
                self._expect(",")
                self._value()
                self._expect(":")
                self._value()
            if is_object:
                self._expect("}")
        self._expect("")

    def _find_list(self) -> bool:
        """Go to the list under one of _LIST_KEYS of the object that begins here; False if there is none."""
        self._expect("{")
        while self.peek() == '"':
            start, end = self._value()
            self._expect(":")
            if json.loads(self._text[start:end]) in _LIST_KEYS and self.peek() == "[":
                return True
            self._value()
            if self.peek() == ",":
                self._place += 1
        return False

    def _list(self) -> Iterator[tuple[int, int]]:
        self._expect("[")
        while self.peek() not in ("]", ""):
            yield self._value()
            if self.peek() != "]":
                self._expect(",")
        self._expect("]")

    def _value(self) -> tuple[int, int]:
        self.peek()
        start = self._place
        try:
            _, self._place = self._decoder.raw_decode(self._text, start)
        except json.JSONDecodeError as error:
            self._refuse(f"{error.msg} at line {error.lineno} column {error.colno}", error)
        except RecursionError as error:
            self._refuse("nested too deeply to be read", error)
        except ValueError as error:  # a number of more digits than Python reads
            self._refuse(f"{error} at line {self._text.count(chr(10), 0, start) + 1}", error)
        return start, self._place

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            line = self._text.count("\n", 0, self._place) + 1
            self._refuse(f"expected {character or 'the end'!r} at line {line}", None)
        self._place += 1

    def _refuse(self, reason: str, cause: Exception | None) -> None:
        raise UserError(
            f"{self._path} is not valid JSON ({reason}); fix it, or write one JSON object per line (JSONL)."
        ) from cause


def _index_table(path: Path, file: BinaryIO, offset: int, suffix: str) -> TextRows:
    """Index the records of a CSV or TSV file, whose first one names the columns; cells stay text, empty ones None."""
    csv.field_size_limit(sys.maxsize)
    file.seek(offset)
    place, number = offset, 0

    def lines() -> Iterator[str]:
        nonlocal place, number
        for line in file:
            place, number = place + len(line), number + 1
            yield line.decode("utf-8", "surrogateescape")  # what is not UTF-8 is refused where the row is read

    delimiter = "\t" if suffix == ".tsv" else _delimiter(file, offset)
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        twice = {name for name in header if header.count(name) > 1}
        if twice:
            raise UserError(f"{path}: the column {min(twice)!r} stands twice in the first line; rename one.")
        rows = TextRows(path, suffix[1:].upper(), file, lambda text: _parse_record(text, header, delimiter))
        start, first = place, number + 1
        for cells in reader:
            if cells:
                rows.add(start, place, first)
            start, first = place, number + 1
    except csv.Error as error:
        raise UserError(
            f"{path}: line {number}: not valid {suffix[1:].upper()} ({error}); fix the quotes there."
        ) from error
    return rows


def _delimiter(file: BinaryIO, offset: int) -> str:
    """Return what separates the columns of a .csv file: a comma, or where the first line has none, ; or a tab."""
    header = file.readline()
    file.seek(offset)
    return next((mark for mark in (",", ";", "\t") if mark.encode() in header), ",")


def _parse_record(text: str, header: list[str], delimiter: str) -> dict[str, Any]:
    cells = next(csv.reader([text], delimiter=delimiter, strict=True))
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells, and the first line names {len(header)} columns")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}
