"""Every format gives the same rows, with the line or row that they came from; what cannot be read is named."""

import bz2
import gzip
import json
import lzma
import os
import time

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from megatron_tropd.data.files import open_data
from megatron_tropd.data.text import parse_object
from megatron_tropd.errors import UserError

ROWS = [{"id": f"r{i}", "text": f"one\u2028two {i}\n\r\nthree \x85 \U0001f600", "answer": "007"} for i in range(5)]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def _jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(mark, rows=ROWS):
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    quoted = (mark.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells)
    return "\n".join(quoted).encode() + b"\n"


TEXTS = {
    "a.jsonl": _jsonl(),
    "bom.jsonl": b"\xef\xbb\xbf" + _jsonl(),
    "crlf.jsonl": _jsonl().replace(b"\n", b"\r\n"),
    "a.json": json.dumps(ROWS, indent=2).encode(),
    "bom.json": b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
    "data.json": json.dumps({"version": [1, {"data": 2}], "data": ROWS}).encode(),
    "lines.json": _jsonl(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "noname": _jsonl(),
    "a.csv": _csv(","),
    "semicolon.csv": _csv(";"),
    "bom.csv": b"\xef\xbb\xbf" + _csv(","),
    "a.tsv": _csv("\t"),
    "a.jsonl.gz": gzip.compress(_jsonl()),
    "a.csv.gz": gzip.compress(_csv(",")),
    "a.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "a.jsonl.xz": lzma.compress(_jsonl()),
    "gz_by_content.jsonl": gzip.compress(_jsonl()),
}


def _rows(path):
    ((rows,),) = open_data(path, "data.prompts")
    if rows.columns is not None:
        rows.select(set(rows.columns))
    assert [rows.read(place) for place in range(len(rows))] == [record for _, record in rows.scan()]
    return rows


ONE_LINE = {"bom.json", "data.json", "array.jsonl", "a.json.bz2"}  # of which several rows begin in one line


@pytest.mark.parametrize("name", TEXTS)
def test_text_formats_give_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(TEXTS[name])
    rows = _rows(tmp_path / name)
    assert [rows.read(place) for place in range(len(rows))] == ROWS
    assert rows.unit == ("row" if name in ONE_LINE else "line")


def _write_columnar(folder):
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    pyarrow.parquet.write_table(table, folder / "odd [1] name.parquet")
    pyarrow.feather.write_feather(table, folder / "a.feather")
    pyarrow.feather.write_feather(table, folder / "plain.feather", compression="uncompressed")
    with pyarrow.OSFile(str(folder / "stream.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    with pyarrow.OSFile(str(folder / "file.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as out:
        out.write_table(table)
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(folder / "saved"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(folder / "splits"))
    datasets.DatasetDict({"train": dataset}).save_to_disk(str(folder / "one_split"))


COLUMNAR = ["a.parquet", "odd [1] name.parquet", "a.feather", "plain.feather", "stream.arrow", "file.arrow"]


@pytest.mark.parametrize("name", [*COLUMNAR, "saved", "splits/train", "one_split"])
def test_columnar_formats_give_the_same_rows(tmp_path, name):
    _write_columnar(tmp_path)
    rows = _rows(tmp_path / name)
    assert [rows.read(place) for place in range(len(rows))] == ROWS
    assert (rows.unit, rows.number(2)) == ("row", 3)


def test_a_folder_of_splits_asks_for_one(tmp_path):
    _write_columnar(tmp_path)
    with pytest.raises(UserError, match=r"holds the splits test, train: name one, as in data.prompts=.*splits/test"):
        open_data(tmp_path / "splits", "data.prompts")
    with pytest.raises(UserError, match=r"`save_to_disk` did not write; give its files by a pattern, such as .*\*\."):
        open_data(tmp_path, "data.prompts")


def test_a_parquet_file_that_changes_is_read_again_and_the_cache_lies_elsewhere(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for text in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), folder / "a.parquet")
        os.utime(folder / "a.parquet", ns=(time.time_ns(),) * 2)
        assert _rows(folder / "a.parquet").read(0) == {"text": text}
    assert os.listdir(folder) == ["a.parquet"]


def test_field_cases_a8_a_parquet_file_of_the_same_size_and_time_is_read_again(tmp_path):
    """`cp -p` and rsync give the new content the time that it had elsewhere."""
    for text in ("old", "new"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "a.parquet", compression="none")
        os.utime(tmp_path / "a.parquet", ns=(10**18, 10**18))
        assert _rows(tmp_path / "a.parquet").read(0) == {"text": text}


def test_parquet_files_that_datasets_does_not_take(tmp_path):
    """Spark writes maps and empty shards, and a newer release of `datasets` names features that this one lacks."""
    table = pyarrow.table({"text": ["a"], "map": pyarrow.array([[("k", 1)]], pyarrow.map_(pyarrow.string(), "int64"))})
    named = {"info": {"features": {"text": {"_type": "Hologram"}}}}
    tables = {
        "map": (table, [{"text": "a"}]),
        "feature": (
            table.select(["text"]).replace_schema_metadata({"huggingface": json.dumps(named)}),
            [{"text": "a"}],
        ),
        "empty": (table.select(["text"]).slice(1), []),
    }
    for name, (table, expected) in tables.items():
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(table, path)
        rows = open_data(path, "data.prompts")[0][0]
        rows.select({"text"})
        assert [row for _, row in rows.scan()] == expected, name


def test_rows_that_share_a_line_are_numbered_as_rows(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    rows = open_data(tmp_path / "a.json", "data.prompts")[0][0]
    assert (rows.unit, [rows.number(place) for place in range(2)]) == ("row", [1, 2])


@pytest.mark.parametrize("cache", ["/proc/no/cache", "/dev/full/cache"])
def test_a_parquet_file_is_read_where_no_cache_can_be_written(tmp_path, monkeypatch, cache, caplog):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    _write_columnar(tmp_path)
    assert _rows(tmp_path / "a.parquet").read(4) == ROWS[4]
    assert "no cache can be written" in caplog.text


def test_null_fields_of_structs_are_left_out_and_types_stay(tmp_path):
    """Arrow gives all rows of a column the fields and the type of their union."""
    tools = [
        [{"type": "function", "parameters": {"a": {"type": "string"}}}],
        [{"type": "function", "parameters": {"b": {"type": "integer", "minimum": 1}}}],
    ]
    pyarrow.parquet.write_table(pyarrow.table({"tools": tools, "n": [1.0, float("nan")]}), tmp_path / "a.parquet")
    assert [record for _, record in _rows(tmp_path / "a.parquet").scan()] == [
        {"tools": tools[0], "n": 1.0},
        {"tools": tools[1]},
    ]
    mixed = [{"answer": 12}, {"answer": "x"}, {"answer": None, "tools": tools[0]}, {"answer": "007"}]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(mixed))
    assert [record for _, record in _rows(tmp_path / "a.jsonl").scan()] == mixed


def test_lines_are_numbered_as_editors_do(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n\n  \n{"a": "\xe2\x80\xa8"}\n')
    (tmp_path / "a.json").write_text('[\n {"a":\n "\u00e9"}, {"a": 2},\n\n {"a": 3}]', encoding="utf-8")
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n\n2,z\n')
    for name, numbers in {"a.jsonl": [2, 5], "a.json": [2, 3, 5], "a.csv": [2, 5]}.items():
        rows = _rows(tmp_path / name)
        assert [rows.number(place) for place in range(len(rows))] == numbers, name


def test_csv_cells_stay_text_and_empty_ones_are_none(tmp_path):
    (tmp_path / "a.csv").write_text('id,text,answer\n007,"a ""b"", c",1.50\nNA,null,\n')
    assert [record for _, record in _rows(tmp_path / "a.csv").scan()] == [
        {"id": "007", "text": 'a "b", c', "answer": "1.50"},
        {"id": "NA", "text": "null", "answer": None},
    ]


def test_long_lines_and_nul_characters(tmp_path):
    rows = [{"text": "\0" + "x" * 2_000_000}, {"text": "y"}]
    (tmp_path / "a.jsonl").write_bytes(_jsonl(rows))
    assert [record for _, record in _rows(tmp_path / "a.jsonl").scan()] == rows


def test_globs_and_lists_are_opened_in_order(tmp_path):
    for name in ("b-1.jsonl", "b-0.jsonl", "a.jsonl"):
        (tmp_path / name).write_bytes(_jsonl())
    parts = open_data([str(tmp_path / "b-*.jsonl"), str(tmp_path / "a.jsonl")], "data.prompts")
    assert [[os.path.basename(rows.path) for rows in part] for part in parts] == [
        ["b-0.jsonl", "b-1.jsonl"],
        ["a.jsonl"],
    ]


BROKEN = {
    "utf16.jsonl": (_jsonl().decode().encode("utf-16"), "UTF-16 .*iconv -f UTF-16 -t UTF-8"),
    "utf16le.csv": ("text\na\n".encode("utf-16-le"), "UTF-16"),
    "latin1.json": ('[\n{"text": "é"}]'.encode("latin-1"), r"line 2: not UTF-8 .* at byte 13 .*iconv -f LATIN1"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "cut.jsonl.gz": (gzip.compress(_jsonl())[:-12], "damaged archive"),
    "cut.json": (b'[{"a": 1}, {"a"', "not valid JSON .*line 1"),
    "comma.json": (b'[{"a": 1}\n {"a": 2}]', "not valid JSON .expected ',' at line 2"),
    "cut_object.json": (b'{"data": [{"a": 1}], "x"', "expected ':' at line 1"),
    "more.json": (b'[{"a": 1}] {"a": 2}', "expected 'the end' at line 1"),
    "quotes.csv": (b'text\n"a" b\n', "quotes.csv: line 2: not valid CSV"),
    "twice.csv": (b"text,text\na,b\n", "the column 'text' stands twice"),
    "other.parquet": (b"{}\n", "does not begin as a parquet file"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read as Parquet"),
    "cut.arrow": (b"ARROW1\0\0 and no more", "cannot be read as Arrow"),
    "cut_inside.jsonl.gz": (gzip.compress(_jsonl())[:12] + bytes(range(6)), "damaged archive"),
    "digits.json": (b'[{"a": ' + b"1" * 5000 + b"}]", "not valid JSON .*digits.* at line 1"),
    "a.parquet.gz": (gzip.compress(b"PAR1"), "compressed Parquet file"),
    "a.zip": (b"PK\x03\x04", "zip archives are not read here; unpack it with `unzip"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd", "unzstd"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_field_cases_b6_what_cannot_be_read_is_named(tmp_path, name):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        open_data(str(tmp_path / name), "data.prompts")
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.jsonl", "nowhere.jsonl cannot be read .No such file"),
        ("nowhere/*.jsonl", r"data.prompts=nowhere/\*.jsonl: no file matches"),
        ("s3://bucket/a.jsonl", "only local files"),
        (["hf://datasets/x"], "only local files"),
    ],
)
def test_paths_that_lead_nowhere(spec, message):
    with pytest.raises(UserError, match=message):
        open_data(spec, "data.prompts")


def test_field_cases_b6_a_line_that_is_not_utf8_is_named_by_its_byte(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n{"a": 2}\n')
    ((rows,),) = open_data(tmp_path / "a.jsonl", "data.prompts")
    records = [record for _, record in rows.scan()]
    assert (records[0], records[2]) == ({"a": 1}, {"a": 2})
    assert "at byte 17 of the file" in str(records[1])


def test_arrow_strings_that_are_not_utf8_spoil_their_row_only(tmp_path):
    bad = pyarrow.array([b"a", b"\xff", b"c"]).view(pyarrow.string())
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file:
        table = pyarrow.table({"text": bad})
        with pyarrow.ipc.new_file(file, table.schema) as out:
            out.write_table(table)
    ((rows,),) = open_data(tmp_path / "a.arrow", "data.prompts")
    rows.select({"text"})
    records = [record for _, record in rows.scan()]
    assert (records[0], records[2]) == ({"text": "a"}, {"text": "c"})
    assert isinstance(records[1], ValueError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "text": "b"}', "'text' stands twice"),
        ('{"m": [{"role": "a", "role": "b"}]}', "'role' stands twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"n": ' + "1" * 5000 + "}", "4300 digits"),
        ("3", "a JSON int, expected an object"),
    ],
)
def test_what_is_no_object(text, message):
    with pytest.raises(ValueError, match=message):
        parse_object(text)
