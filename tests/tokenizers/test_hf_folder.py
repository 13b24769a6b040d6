"""Files beside the weights: which end-of-text ids they name, the ids written back, and another tokenizer's files."""

import json

import pytest
import sentencepiece
from support.tiny_models import BOS_ID, EOS_ID, PAD_ID, make_tokenizer

from megatron_tropd.errors import UserError
from megatron_tropd.tokenizers.hf_folder import (
    TOKENIZER_FILES,
    copy_files,
    read_eos_ids,
    replace_tokenizer,
    write_eos_ids,
)
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture
def folder(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def _write(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": 9}, {"eos_token_id": [7]}, {9}),
        ({"eos_token_id": [9, 7]}, {}, {9, 7}),
        ({"temperature": 0.6}, {"eos_token_id": [9, 7]}, {9, 7}),
        ({"eos_token_id": None}, {"eos_token_id": 9}, {9}),
        ({"eos_token_id": []}, {"eos_token_id": 9}, {9}),
        (None, {"eos_token_id": [9, 7]}, {9, 7}),
        (None, {"eos_token_id": 9}, {9}),
        (None, {"text_config": {"eos_token_id": [9]}}, {9}),
        (None, {"eos_token_id": 7, "text_config": {"eos_token_id": 9}}, {7}),
        (None, {"eos_token_id": -1}, set()),
        (None, None, set()),
    ],
)
def test_field_cases_a2_end_ids_are_read_as_transformers_does(folder, generation_config, config, expected):
    files = {"generation_config": generation_config, "config": config}
    _write(folder, **{name: content for name, content in files.items() if content is not None})
    assert set(read_eos_ids(folder)) == expected
    assert load_tokenizer(folder).eos_ids == expected | {EOS_ID}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"eos_token_id": "</s>"}, r"generation_config\.json: eos_token_id='</s>' is neither a token id nor a list"),
        ({"eos_token_id": [2, None]}, r"eos_token_id=\[2, None\] is neither"),
        ({"eos_token_id": True}, "eos_token_id=True is neither"),
        ("{", r"generation_config\.json cannot be read as JSON"),
        ("[2]", r"generation_config\.json holds a list"),
    ],
)
def test_field_cases_a2_a_broken_file_is_named_and_not_passed_over(folder, content, message):
    _write(folder, generation_config=content, config={"eos_token_id": 9})
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def test_field_cases_a1_ids_are_written_beside_the_other_fields(folder):
    fields = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "pad_token_id": PAD_ID, "bos_token_id": BOS_ID}
    _write(folder, generation_config={**fields, "eos_token_id": [9, 3]})
    write_eos_ids(folder, {3, 9, 2}, load_tokenizer(folder))
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {**fields, "eos_token_id": [9, 3, 2]}  # what was there stays first: transformers pads with it


@pytest.mark.parametrize("pad", [None, -1, 5000, "x"])
def test_field_cases_a1_a_folder_without_the_file_gets_one_that_transformers_reads(folder, pad):
    from transformers import GenerationConfig

    if pad is not None:
        _write(folder, generation_config={"pad_token_id": pad, "bos_token_id": BOS_ID})
    write_eos_ids(folder, {EOS_ID}, load_tokenizer(folder))
    config = GenerationConfig.from_pretrained(folder)
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (EOS_ID, PAD_ID, BOS_ID)
    assert config.stop_strings is None


def test_another_tokenizer_leaves_nothing_of_the_folders_own(folder, tmp_path):
    other = make_tokenizer(140)
    other.chat_template = "{{ messages[0]['content'] }}!"
    other.save_pretrained(tmp_path / "other")
    (folder / "tokenizer.model").write_text("the folder's own")
    _write(folder, config={"model_type": "llama"})
    replace_tokenizer(folder, tmp_path / "other", None)
    assert not (folder / "tokenizer.model").exists()
    assert (folder / "config.json").exists()
    loaded = load_tokenizer(folder)
    assert loaded.vocab_size == 140
    assert loaded.pieces() == load_tokenizer(tmp_path / "other").pieces()


def test_a_sentencepiece_model_and_a_template_make_a_folder_that_is_read_again(folder, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"the answer is {n} and a half" for n in range(50)]),
        **{"model_prefix": str(tmp_path / "m"), "vocab_size": 45, "model_type": "bpe", "minloglevel": 2},
    )
    (tmp_path / "new.jinja").write_text("{{ bos_token + messages[0]['content'] }} the")
    run = load_tokenizer(tmp_path / "m.model", tmp_path / "new.jinja")
    replace_tokenizer(folder, tmp_path / "m.model", tmp_path / "new.jinja")
    prompt = Prompt("0", messages=[{"role": "user", "content": "answer"}])
    assert load_tokenizer(folder).encode_prompt(prompt) == run.encode_prompt(prompt)


@pytest.mark.parametrize("is_inline", [True, False])
def test_a_template_goes_before_the_tokenizers_own_for_every_reader(folder, tmp_path, is_inline):
    from transformers import AutoTokenizer

    if is_inline:  # as folders before transformers 4.43 keep it
        (folder / "chat_template.jinja").unlink()
        content = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**content, "chat_template": "{{ 'old' }}"}))
    (tmp_path / "new.jinja").write_text("{{ 'new' }}")
    replace_tokenizer(folder, None, tmp_path / "new.jinja")
    assert AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, tokenize=False) == "new"
    assert "old" not in (folder / "tokenizer_config.json").read_text()


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_field_cases_a1_a_template_file_reaches_the_exported_folder_without_its_byte_order_mark(
    folder, tmp_path, line_end
):
    from transformers import AutoTokenizer

    text = line_end.join(["{{ bos_token }}{% for m in messages %}", "{{ m.content }}{% endfor %}"])
    (tmp_path / "new.jinja").write_bytes(b"\xef\xbb\xbf" + text.encode())
    run = load_tokenizer(folder, tmp_path / "new.jinja")
    replace_tokenizer(folder, None, tmp_path / "new.jinja")
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(MESSAGES, return_dict=False)
    assert (
        theirs
        == run.encode_prompt(Prompt("0", messages=MESSAGES))
        == load_tokenizer(folder).encode_prompt(Prompt("0", messages=MESSAGES))
    )


def test_field_cases_a1_a_template_for_prompts_with_tools_goes_along_and_goes_away(folder, tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    prompt = Prompt("0", messages=MESSAGES, tools=tools)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools[0].function.name }}{{ messages }}")
    (tmp_path / "copy").mkdir()
    copy_files(folder, tmp_path / "copy", TOKENIZER_FILES)
    run = load_tokenizer(folder)
    assert load_tokenizer(tmp_path / "copy").prompt_text(prompt) == run.prompt_text(prompt)
    make_tokenizer().save_pretrained(tmp_path / "plain")
    replace_tokenizer(tmp_path / "copy", tmp_path / "plain", None)
    plain = load_tokenizer(tmp_path / "plain").prompt_text(prompt)
    assert load_tokenizer(tmp_path / "copy").prompt_text(prompt) == plain
    replace_tokenizer(tmp_path / "plain", folder, None)
    assert load_tokenizer(tmp_path / "plain").prompt_text(prompt) == run.prompt_text(prompt)
    (tmp_path / "new.jinja").write_text("{{ messages[0]['content'] }}!")
    replace_tokenizer(tmp_path / "plain", None, tmp_path / "new.jinja")
    assert load_tokenizer(tmp_path / "plain").prompt_text(prompt) == "Hello!"


def test_field_cases_a1_copies_of_read_only_files_can_be_edited(folder, tmp_path):
    for file in folder.iterdir():
        file.chmod(0o444)
    (tmp_path / "copy").mkdir()
    copy_files(folder, tmp_path / "copy", TOKENIZER_FILES)
    modes = [file.stat().st_mode & 0o200 for file in (tmp_path / "copy").iterdir()]
    assert len(modes) >= 3
    assert all(modes)


def test_field_cases_a2_config_json_gets_the_same_ids(folder):
    _write(folder, config={"model_type": "llama", "eos_token_id": 9, "hidden_act": "silu"})
    write_eos_ids(folder, {9, EOS_ID}, load_tokenizer(folder))
    config, generation = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config == {"model_type": "llama", "eos_token_id": [9, EOS_ID], "hidden_act": "silu"}
    assert generation["eos_token_id"] == config["eos_token_id"]
