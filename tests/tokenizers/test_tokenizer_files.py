"""Folders whose tokenizer transformers builds otherwise than their files say."""

import json
import logging

import pytest
import sentencepiece
from support.tiny_tokenizers import (
    BOS,
    EOS,
    edit_config,
    train_sentencepiece,
    write_byte_level,
    write_llama,
    write_pieces,
)
from tokenizers import AddedToken, Tokenizer

from megatron_tropd.errors import UserError
from megatron_tropd.tokenizers.probes import PROBES
from megatron_tropd.tokenizers.tokenizer import describe_check, load_tokenizer
from megatron_tropd.types import Prompt


def assert_as_json_says(folder, tokenizer):
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*PROBES, f"a {BOS} b{EOS}c", f"{EOS}  x"]:
        assert tokenizer.encode(text) == file.encode(text, add_special_tokens=False).ids, text
    for text in PROBES:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == file.decode(ids)
    assert {piece: i for i, piece in tokenizer.pieces().items()} == file.get_vocab()


@pytest.mark.parametrize(
    "tokenizer_class",
    [
        *("LlamaTokenizerFast", "LlamaTokenizer", "GemmaTokenizerFast", "Qwen2TokenizerFast", "GPT2TokenizerFast"),
        *("CodeLlamaTokenizerFast", "T5TokenizerFast", "TokenizersBackend", "NoSuchTokenizer", "PreTrainedTokenizer"),
    ],
)
def test_field_cases_a14_a_byte_level_folder_is_read_as_its_file_says(tmp_path, tokenizer_class):
    tokenizer = load_tokenizer(write_byte_level(tmp_path / "f", tokenizer_class))
    assert_as_json_says(tmp_path / "f", tokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (0, 1, 1, 500)
    ids = tokenizer.encode_prompt(Prompt("0", messages=[{"role": "user", "content": "Hello  world 2024"}]))
    assert ids == [0, *tokenizer.encode("Hello  world 2024"), 1]
    assert tokenizer.decode(ids) == "Hello  world 2024"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("tokenizer_class", ["Qwen2TokenizerFast", "LlamaTokenizerFast", "GPT2TokenizerFast"])
def test_field_cases_a14_a_folder_like_llama_2_is_read_as_its_file_says(tmp_path, tokenizer_class, legacy):
    folder = write_llama(tmp_path / "f", legacy, tokenizer_class)
    assert_as_json_says(folder, load_tokenizer(folder))


def test_field_cases_a14_a_folder_that_asks_for_its_own_code_is_read_from_its_file(tmp_path, monkeypatch):
    folder = write_byte_level(tmp_path / "f", "MineTokenizer", auto_map={"AutoTokenizer": [None, "mine.MineTokenizer"]})
    (folder / "mine.py").write_text("raise SystemExit('this ran')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    assert_as_json_says(folder, load_tokenizer(folder))


def test_field_cases_a14_the_warning_names_text_ids_and_remedy(tmp_path, caplog):
    folder = write_byte_level(tmp_path / "f", "Qwen2TokenizerFast")
    with caplog.at_level(logging.WARNING):
        load_tokenizer(folder)
    (message,) = (r.getMessage() for r in caplog.records if "otherwise than its tokenizer.json" in r.getMessage())
    assert str(folder) in message
    # transformers 4 keeps the file's ids but adds the class's own special tokens; 5 splits digits by the class's rules.
    assert "gives the ids [" in message or "it adds '<|endoftext|>', which no file names" in message
    assert '"tokenizer_class": "PreTrainedTokenizerFast"' in message
    caplog.clear()
    edit_config(folder, tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer(folder)
    assert not caplog.records  # the remedy helps


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "T5Tokenizer"])
@pytest.mark.parametrize("options", [{}, {"add_dummy_prefix": False}, {"normalization_rule_name": "nmt_nfkc"}])
def test_field_cases_a14_a_folder_with_only_tokenizer_model_gives_its_ids(
    tmp_path, tokenizer_class, model_type, options
):
    folder = write_pieces(tmp_path / "f", tokenizer_class, model_type=model_type, **options)
    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in PROBES:
        assert tokenizer.encode(text) == processor.encode(text), text
    assert (tokenizer.eos_id, tokenizer.encode("</s>")) == (2, [2])


@pytest.mark.parametrize("legacy", [None, False, True])
def test_field_cases_a14_added_tokens_of_a_folder_with_only_tokenizer_model_count(tmp_path, legacy):
    folder = write_pieces(
        tmp_path / "f",
        "LlamaTokenizer",
        {
            "added_tokens_decoder": {
                "420": {"content": "<|im_start|>", "special": True, "normalized": False},
                "421": {"content": "<|im_end|>", "special": True, "normalized": False},
                "422": {"content": "<think>", "special": False, "normalized": False},
            },
            **{"eos_token": "<|im_end|>", "pad_token": "[PAD]", "legacy": legacy},
            "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
            "<|im_end|>{% endfor %}<think>",
        },
        control_symbols=["[INST]", "[/INST]"],
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 421]}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.bos_id, tokenizer.pad_id) == (421, {2, 421}, 1, 423)
    assert tokenizer.pieces()[420] == "<|im_start|>"
    assert tokenizer.vocab_size == 424
    ids = tokenizer.encode_prompt(Prompt("0", messages=[{"role": "user", "content": "Hello  there"}]))
    assert (ids[0], ids[-2:]) == (420, [421, 422])
    assert not {420, 421, 422} & set(ids[1:-2])
    # <think> is no special token, and what follows one starts a new text if the folder sets `legacy`.
    assert tokenizer.decode_response(ids) == (" " if legacy else "") + "user\nHello  there<think>"
    assert tokenizer.encode_response("Hi", add_eos=True)[-1] == 421


def test_field_cases_a14_tokenizer_json_takes_precedence_over_tokenizer_model(tmp_path, caplog):
    folder = write_byte_level(tmp_path / "f")
    train_sentencepiece(folder)
    with caplog.at_level(logging.WARNING):
        tokenizer = load_tokenizer(folder)
    assert_as_json_says(folder, tokenizer)
    (message,) = (r.getMessage() for r in caplog.records)
    assert "tokenizer.json and tokenizer.model disagree, as on 'Hello world': [" in message
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # a tiktoken file, as Llama 3's
    caplog.clear()
    load_tokenizer(folder)
    assert not caplog.records


def test_field_cases_a14_flags_and_tokens_of_tokenizer_config_count(tmp_path, caplog):
    folder = write_byte_level(tmp_path / "f")
    added = {"1": {"content": EOS, "special": True, "rstrip": True, "lstrip": False, "normalized": False}}
    added["500"] = {"content": "<extra>", "special": True, "normalized": False}
    edit_config(folder, added_tokens_decoder=added)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a <extra>b")[1:] == [*tokenizer.encode(" "), 500, *tokenizer.encode("b")]
    assert not caplog.records
    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.add_tokens([AddedToken(EOS, rstrip=True, special=True, normalized=False)])
    assert tokenizer.encode(f"a{EOS}  b") == file.encode(f"a{EOS}  b", add_special_tokens=False).ids


def test_field_cases_a14_tokens_of_added_tokens_json_alone_are_parsed(tmp_path):
    folder = write_byte_level(tmp_path / "f")
    (folder / "added_tokens.json").write_text(json.dumps({"<extra>": 500, "<more>": 501}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a<more>b<extra>")[1::2] == [501, 500]
    assert tokenizer.vocab_size == 502


def test_field_cases_a14_an_end_token_that_the_vocabulary_lacks_is_told(tmp_path, caplog):
    load_tokenizer(write_byte_level(tmp_path / "f", eos_token="<|eot|>"))
    assert "names eos_token '<|eot|>', which tokenizer.json does not have" in caplog.text


def test_field_cases_a14_a_tokenizer_without_ids_is_refused(tmp_path):
    folder = write_byte_level(tmp_path / "f", "LlamaTokenizer")
    Tokenizer.from_file(str(folder / "tokenizer.json")).model.save(str(folder))  # vocab.json and merges.txt
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        UserError, match=r"gives no ids for 'Two words|holds no tokenizer that transformers can"
    ) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    edit_config(folder, tokenizer_class="GPT2Tokenizer")
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("Hello  world")) == "Hello  world"


@pytest.mark.parametrize("where", ["tokenizer_config.json", "added_tokens.json"])
def test_field_cases_a14_a_renamed_token_that_would_get_another_row_is_refused(tmp_path, where):
    folder = write_byte_level(tmp_path / "f")
    if where == "tokenizer_config.json":
        flags = {"special": True, "normalized": False}
        edit_config(folder, added_tokens_decoder={"7": {"content": "<|im_start|>", **flags}})
    else:
        (folder / where).write_text(json.dumps({EOS: 7}))
    with pytest.raises(UserError, match=r"gives '<\|\w+\|>' the id 7, and the vocabulary gives it \d+; rename"):
        load_tokenizer(folder)


def test_field_cases_a14_add_bos_token_counts_for_raw_text(tmp_path):
    folder = write_byte_level(tmp_path / "f")
    for says, first in ((True, 0), (False, None)):
        edit_config(folder, add_bos_token=says)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.bos_id == first
        ids = tokenizer.encode_prompt(Prompt("0", text="Hello"))
        assert ids == [*([] if first is None else [first]), *tokenizer.encode("Hello")]


def test_field_cases_a14_a_tokenizer_that_loses_spaces_is_told(tmp_path, caplog):
    folder = write_llama(tmp_path / "f", legacy=True)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": ""}],
    }
    content["decoder"]["decoders"].append({"type": "Fuse"})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    load_tokenizer(folder)
    assert "decodes the ids of 'Two words, 3 numbers' to 'Twowords,3numbers'" in caplog.text


def test_a_conversion_says_by_what_the_ids_were_checked(tmp_path):
    (tmp_path / "none").mkdir()
    assert describe_check(tmp_path / "none") == "tokenizer: the folder has none"
    said = f"{len(PROBES)} probe texts get the ids of"
    assert describe_check(write_byte_level(tmp_path / "json")) == f"tokenizer: 500 ids; {said} tokenizer.json"
    pieces = write_pieces(tmp_path / "pieces", "LlamaTokenizer")
    assert describe_check(pieces) == f"tokenizer: 420 ids; {said} tokenizer.model"
    bare = write_byte_level(tmp_path / "bare", "GPT2Tokenizer")
    Tokenizer.from_file(str(bare / "tokenizer.json")).model.save(str(bare))
    (bare / "tokenizer.json").unlink()
    assert "ids, not checked: there is no tokenizer.json or tokenizer.model" in describe_check(bare)


def test_a_model_file_that_is_not_sentencepieces_is_no_traceback(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(UserError, match=r"tokenizer\.model is not a sentencepiece model .*give the tokenizer's"):
            load_tokenizer(path)


def test_field_cases_a14_a_folder_is_opened_and_warned_of_once_until_it_changes(tmp_path, caplog):
    folder = write_byte_level(tmp_path / "folder", tokenizer_class="Qwen2TokenizerFast")
    first, second = load_tokenizer(folder), load_tokenizer(folder, with_template=False)
    said = [record for record in caplog.records if "otherwise than its tokenizer.json says" in record.message]
    assert len(said) == 1
    assert first.template is not None
    assert second.template is None
    assert first.pieces() == second.pieces()
    first.save(tmp_path / "first")
    assert load_tokenizer(tmp_path / "first").template is not None
    edit_config(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token="<|begin|>")
    assert load_tokenizer(folder).eos_id != first.eos_id
