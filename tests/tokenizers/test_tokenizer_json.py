"""Whether a tokenizer is that of a tokenizer.json, told without reading the file into a second tokenizer."""

import json

import pytest
from support.tiny_tokenizers import write_byte_level
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from megatron_tropd.tokenizers import files as tokenizer_files
from megatron_tropd.tokenizers.json_models import is_same
from megatron_tropd.tokenizers.tokenizer import load_tokenizer


@pytest.fixture
def file(tmp_path):
    return write_byte_level(tmp_path / "folder") / "tokenizer.json"


def _swap_merges(content):
    merges = content["model"]["merges"]
    merges[0], merges[40] = merges[40], merges[0]


def _edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content, indent=2))


def test_a_tokenizer_is_that_of_its_file_however_the_file_is_written(file):
    backend = Tokenizer.from_file(str(file))
    assert is_same(backend, file, {})
    backend.post_processor = None
    _edit(file, lambda c: c["model"].update(merges=[" ".join(merge) for merge in c["model"]["merges"]]))  # before 0.20
    assert is_same(backend, file, {})
    file.write_text(json.dumps(json.loads(file.read_text())))
    assert is_same(backend, file, {})


@pytest.mark.parametrize(
    "change",
    [
        _swap_merges,
        lambda c: c["model"]["vocab"].update(zzz=900),
        lambda c: c["model"].update(ignore_merges=True),
        lambda c: c.update(normalizer={"type": "NFC"}),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "x"}),
        lambda c: c["added_tokens"][1].update(lstrip=True),
        lambda c: c["added_tokens"].pop(),
        lambda c: c.update(decoder=None),
        lambda c: c.pop("model"),
    ],
)
def test_whatever_may_change_ids_or_texts_is_seen(file, change):
    backend = Tokenizer.from_file(str(file))
    _edit(file, change)
    assert not is_same(backend, file, {})


def test_changes_of_the_tokenizer_and_other_flags_are_seen(file):
    for attribute, value in (("normalizer", normalizers.NFKC()), ("pre_tokenizer", pre_tokenizers.Whitespace())):
        backend = Tokenizer.from_file(str(file))
        setattr(backend, attribute, value)
        assert not is_same(backend, file, {})
    backend = Tokenizer.from_file(str(file))
    assert is_same(backend, file, {"<|end|>": {"special": True, "lstrip": False}})
    assert not is_same(backend, file, {"<|end|>": {"special": True, "lstrip": True}})
    assert not is_same(backend, file, {"<|other|>": {"special": True, "lstrip": False}})
    backend.add_tokens([AddedToken("<|other|>")])
    assert not is_same(backend, file, {})
    assert not is_same(backend, file.with_name("none.json"), {})


def test_an_ordinary_folder_is_read_once(file, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "_json_difference", lambda *_, **__: pytest.fail("the file was read again"))
    assert load_tokenizer(file.parent).vocab_size == 500
