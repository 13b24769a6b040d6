"""Tokenizers: Hugging Face folders, bare sentencepiece models, templates, end ids, and two vocabularies compared."""

import json
import shutil
from types import SimpleNamespace

import pytest
import sentencepiece
from support.tiny_models import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, make_tokenizer
from support.tiny_tokenizers import edit_config, train_sentencepiece, write_byte_level, write_llama

from megatron_tropd.config import ModelConfig, TokenizerConfig
from megatron_tropd.errors import UserError
from megatron_tropd.tokenizers.probes import PROBES
from megatron_tropd.tokenizers.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    check_compatible,
    check_vocabulary,
    load_tokenizer,
    open_tokenizer,
)
from megatron_tropd.types import Prompt

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
TEXT = "The quick brown fox jumps over 13 lazy dogs"
CONTROLS = {"control_symbols": ["[INST]", "[/INST]", "[INST]x"], "user_defined_symbols": ["<tool>"]}


@pytest.fixture
def folder(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A small sentencepiece model with ids 1 for BOS, 2 for EOS and no padding."""
    root = tmp_path_factory.mktemp("sentencepiece")
    lines = [f"{TEXT} and {n} cats; answer: {n + 2}" for n in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(root / "m"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    return root / "m.model"


@pytest.fixture
def template(tmp_path):
    file = tmp_path / "template.jinja"
    file.write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}The")
    return file


def test_a_hugging_face_folder_is_read(folder):
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (
        *(VOCAB_SIZE, BOS_ID),
        *(EOS_ID, PAD_ID),
    )
    assert tokenizer.eos_ids == {EOS_ID}
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT)
    assert tokenizer.decode([BOS_ID, *ids, EOS_ID]) == TEXT
    assert tokenizer.encode_response("a", add_eos=True) == [*tokenizer.encode("a"), EOS_ID]
    assert tokenizer.encode_response("a") == tokenizer.encode("a")
    assert tokenizer.pieces()[EOS_ID] == "</s>"
    assert sorted(tokenizer.pieces()) == list(range(VOCAB_SIZE))


def test_a_chat_prompt_is_templated_with_one_bos_and_a_generation_prompt(folder):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode_prompt(Prompt("0", messages=MESSAGES))
    assert ids[0] == BOS_ID
    assert BOS_ID not in ids[1:]
    assert tokenizer.decode(ids) == "[system]Be brief.\n[user]2 + 2?\n[assistant]"


def test_a_text_prompt_starts_with_bos_where_the_tokenizer_puts_one(folder):
    assert load_tokenizer(folder).encode_prompt(Prompt("0", text="ab"))[0] == BOS_ID
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer = HuggingFaceTokenizer(tokenizer, set())
    assert tokenizer.bos_id is None
    assert tokenizer.encode_prompt(Prompt("0", text="ab")) == tokenizer.encode("ab")


@pytest.mark.parametrize(("ids", "expected"), [([7, 9], {7, 9, EOS_ID}), (9, {9, EOS_ID}), (None, {EOS_ID})])
def test_end_ids_of_the_generation_config_count(folder, ids, expected):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == expected
    assert tokenizer.eos_id == EOS_ID


def test_without_any_end_token_responses_could_not_end(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in ("eos_token", "pad_token")}))
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        load_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [9, 7]}')
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.eos_ids, tokenizer.pad_id) == (7, {7, 9}, 7)


def test_a_template_file_replaces_the_tokenizers_own(folder, template):
    tokenizer = load_tokenizer(folder, template)
    ids = tokenizer.encode_prompt(Prompt("0", messages=MESSAGES))
    assert ids == [
        *[BOS_ID, *tokenizer.encode("Be brief."), EOS_ID],
        *[*tokenizer.encode("2 + 2?"), EOS_ID, *tokenizer.encode("The")],
    ]
    with pytest.raises(UserError, match=r"chat_template=.*nowhere\.jinja cannot be read"):
        load_tokenizer(folder, folder / "nowhere.jinja")


def test_a_chat_prompt_without_a_template_is_refused(model_file):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    for tokenizer in (HuggingFaceTokenizer(tokenizer, set()), load_tokenizer(model_file)):
        with pytest.raises(UserError, match=r"needs a chat template.*tokenizer\.chat_template=FILE\.jinja"):
            tokenizer.encode_prompt(Prompt("0", messages=MESSAGES))


def test_a_bare_sentencepiece_model_is_read(model_file, tmp_path):
    tokenizer = load_tokenizer(model_file)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (60, 1, {2}, 2)
    ids = tokenizer.encode_prompt(Prompt("0", text=TEXT))
    assert ids[0] == 1
    assert 1 < len(ids) < len(TEXT)
    assert tokenizer.decode([*ids, 2]) == TEXT
    assert tokenizer.pieces()[2] == "</s>"
    tokenizer.save(tmp_path)  # a folder with only tokenizer.model is read the same way
    assert load_tokenizer(tmp_path).pieces() == tokenizer.pieces()


def test_sentencepiece_templates_write_control_pieces_as_single_ids(model_file, template):
    tokenizer = load_tokenizer(model_file, template)
    ids = tokenizer.encode_prompt(Prompt("0", messages=[{"role": "user", "content": TEXT}]))
    assert ids == [1, *tokenizer.encode(TEXT), 2, *tokenizer.encode_response("The")]


LIKE_LLAMA = {  # tokenizers that put a space in front of every text
    "sentencepiece_bpe": lambda folder: train_sentencepiece(folder, **CONTROLS),
    "sentencepiece_unigram": lambda folder: train_sentencepiece(folder, model_type="unigram", **CONTROLS),
    "sentencepiece_collapsing": lambda folder: train_sentencepiece(folder, remove_extra_whitespaces=True, **CONTROLS),
    "llama": lambda folder: write_llama(folder, legacy=False),
    "llama_legacy": lambda folder: write_llama(folder, legacy=True),
}
NOT_LIKE_LLAMA = {
    "sentencepiece_no_prefix": lambda folder: train_sentencepiece(folder, add_dummy_prefix=False, **CONTROLS),
    "byte_level": write_byte_level,
}
RESPONSES = ["Hello", " Hello", "  Hello", "\n\nHello", "Hi  there \n x", ".com", "0", "a", ";", "好", "🙂 é", " ", ""]


@pytest.fixture(params=[*LIKE_LLAMA, *NOT_LIKE_LLAMA])
def any_tokenizer(request, tmp_path):
    tokenizer = load_tokenizer({**LIKE_LLAMA, **NOT_LIKE_LLAMA}[request.param](tmp_path / "t"))
    tokenizer.collapses = "collapsing" in request.param
    return tokenizer


def test_field_cases_a21_a_response_is_its_own_text(any_tokenizer):
    for text in [*RESPONSES, *PROBES]:
        ids = any_tokenizer.encode_response(text)
        shown = any_tokenizer.decode_response(ids)
        if any_tokenizer.collapses and "  " in text.replace("\n", " ") + " ":
            continue  # the model itself makes one space of several
        assert shown == text, text
        assert any_tokenizer.encode_response(shown) == ids


def test_field_cases_a21_a_response_has_no_space_that_was_not_there(any_tokenizer):
    pieces = [any_tokenizer.pieces()[i] for i in any_tokenizer.encode_response("Hello")]
    assert "".join(pieces) == "Hello"
    spaced = [any_tokenizer.pieces()[i] for i in any_tokenizer.encode_response(" Hello")]
    assert "".join(spaced) in ("▁Hello", "ĠHello")
    assert any_tokenizer.encode_response("Hello", add_eos=True)[-1] == any_tokenizer.eos_id
    assert any_tokenizer.encode_response("Hello", add_eos=True)[:-1] == any_tokenizer.encode_response("Hello")


def test_field_cases_a21_a_prompt_and_its_response_are_the_whole_conversation(any_tokenizer):
    for prompt in ("Question: 2 + 2?\nAnswer:", "Say it [INST]", "x\n"):
        for response in ("Hello", " Hello", "\nHello there", " 中文 🙂"):
            if any_tokenizer.collapses and (prompt + response).count("\n"):
                continue
            whole = any_tokenizer.encode(prompt + response)
            assert any_tokenizer.encode(prompt) + any_tokenizer.encode_response(response) == whole, (prompt, response)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_field_cases_a21_control_pieces_in_a_rendered_prompt_are_single_ids(tmp_path, model_type):
    (tmp_path / "t.jinja").write_text("{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")
    file = train_sentencepiece(tmp_path / "m", model_type=model_type, **CONTROLS)
    tokenizer = load_tokenizer(file, tmp_path / "t.jinja")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = {piece: processor.piece_to_id(piece) for piece in ("[INST]", "[/INST]", "[INST]x", "<tool>", "<s>", "</s>")}
    rendered = tokenizer.encode_prompt(Prompt("0", messages=[{"role": "user", "content": " Hello"}]))
    assert rendered == [1, ids["[INST]"], *tokenizer.encode_response(" Hello"), ids["[/INST]"]]
    text = "[INST]x<tool>[INST]</s>[/INST]y"  # the longest control piece counts; <tool> is a user-defined one
    inner = [ids["<tool>"], ids["[INST]"], ids["</s>"], ids["[/INST]"]]
    assert tokenizer.encode(text) == [ids["[INST]x"], *inner, *tokenizer.encode_response("y")]
    assert tokenizer.decode(rendered).strip() == "Hello"
    assert tokenizer.decode_response([ids["[/INST]"], *tokenizer.encode_response(" y<tool>"), 2]) == " y<tool>"


def test_a_text_prompt_that_begins_with_bos_gets_no_second_one(any_tokenizer):
    bos = any_tokenizer.pieces()[any_tokenizer.bos_id]
    ids = any_tokenizer.encode_prompt(Prompt("0", text=f"{bos}Hello"))
    assert ids.count(any_tokenizer.bos_id) == 1
    assert any_tokenizer.encode_prompt(Prompt("0", text="Hello"))[0] == any_tokenizer.bos_id
    eos = any_tokenizer.pieces()[any_tokenizer.eos_id]
    assert any_tokenizer.encode_response(f"Hello{eos}", add_eos=True).count(any_tokenizer.eos_id) == 1


def test_a_chat_template_that_writes_no_bos_is_told_once(folder, template, caplog):
    prompt = Prompt("0", messages=MESSAGES)
    load_tokenizer(folder, template).encode_prompt(prompt)
    assert "BOS" not in caplog.text
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer = load_tokenizer(folder, template)
    assert BOS_ID not in tokenizer.encode_prompt(prompt) + tokenizer.encode_prompt(prompt)
    assert caplog.text.count("starts texts with BOS; chat prompts have none: the template writes no bos_token") == 1


def test_half_a_surrogate_pair_is_no_traceback(any_tokenizer):
    for encode in (any_tokenizer.encode_response, lambda text: any_tokenizer.encode_prompt(Prompt("0", text=text))):
        with pytest.raises(UserError, match=r"half of a surrogate pair \('\\ud83d' at character 2\)"):
            encode("ab\ud83dc")


def test_a_sentencepiece_model_without_an_end_piece_is_refused(tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 5),
        model_prefix=str(tmp_path / "m"),
        **{"vocab_size": 40, "model_type": "bpe", "eos_id": -1, "minloglevel": 2},
    )
    with pytest.raises(UserError, match="has no end-of-sequence piece"):
        load_tokenizer(tmp_path / "m.model")


def test_a_path_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: no such folder or \.model file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="holds no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


def test_a_saved_tokenizer_is_the_same(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    check_compatible(copy, tokenizer)
    prompt = Prompt("0", messages=MESSAGES)
    assert copy.encode_prompt(prompt) == tokenizer.encode_prompt(prompt)


def test_equal_vocabularies_are_compatible_and_the_first_differences_are_named(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    student = load_tokenizer(folder)
    check_compatible(student, load_tokenizer(other))
    text = (other / "tokenizer.json").read_text()
    data = json.loads(text)
    vocab = data["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (other / "tokenizer.json").write_text(json.dumps(data))
    first = min(vocab["A"], vocab["B"])
    with pytest.raises(UserError, match=rf"2 ids differ, first id {first}: student 'A', teacher 'B'; id {first + 1}"):
        check_compatible(student, load_tokenizer(other))


def test_vocabularies_of_other_sizes_are_incompatible():
    student, teacher = (HuggingFaceTokenizer(make_tokenizer(size), set()) for size in (VOCAB_SIZE, VOCAB_SIZE + 9))
    with pytest.raises(UserError, match=r"sizes 140 and 131\).*9 ids differ.*id 131: student nothing") as error:
        check_compatible(student, teacher)
    assert "id 135" in str(error.value)
    assert "id 136" not in str(error.value)  # five are enough
    assert "tokenizer.check_compatibility=false" in str(error.value)


def _digits_one_by_one(folder):
    """The same pieces and merges under another pre-tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    split = content["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace("{1,3}", "")
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _other_merges(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-150]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def _lower_case(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change", [_digits_one_by_one, _other_merges, _lower_case])
def test_field_cases_a14_a_teacher_that_splits_texts_otherwise_is_refused(tmp_path, change):
    student = load_tokenizer(write_byte_level(tmp_path / "student"))
    change(write_byte_level(tmp_path / "teacher"))
    teacher = load_tokenizer(tmp_path / "teacher")
    assert student.pieces() == teacher.pieces()
    with pytest.raises(
        UserError, match=r"same pieces but split texts otherwise: '.*' is \[.*\] to the student"
    ) as error:
        check_compatible(student, teacher)
    assert "tokenizer.check_compatibility=false" in str(error.value)


def test_field_cases_a14_what_base_and_instruct_models_differ_in_is_no_reason_to_refuse(tmp_path, caplog):
    base = write_byte_level(tmp_path / "base")
    instruct = write_byte_level(tmp_path / "instruct", pad_token="<|end|>", chat_template="{{ messages[0].content }}")
    check_compatible(load_tokenizer(base), load_tokenizer(instruct))
    assert not caplog.records
    edit_config(instruct, add_bos_token=False)
    check_compatible(load_tokenizer(base), load_tokenizer(instruct))
    assert (
        "raw `text` prompts start with BOS, as the student's tokenizer does; the teacher's does otherwise"
        in caplog.text
    )


def test_a_checkpoint_with_another_tokenizer_than_hf_paths_is_refused(tmp_path):
    ours, inside = write_byte_level(tmp_path / "hf"), write_byte_level(tmp_path / "checkpoint" / "hf")
    model = ModelConfig(hf_path=str(ours), checkpoint=str(tmp_path / "checkpoint"))
    open_tokenizer(TokenizerConfig(), model, ours, "student")
    _digits_one_by_one(inside)
    with pytest.raises(UserError, match=r"student\.hf_path and student\.checkpoint have the same pieces but split"):
        open_tokenizer(TokenizerConfig(), model, ours, "student")
    open_tokenizer(TokenizerConfig(path=str(ours)), model, ours, "student")


def test_ids_beyond_the_embedding_are_named(folder):
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, SimpleNamespace(vocab_size=VOCAB_SIZE), "student")
    with pytest.raises(UserError, match=r"131 ids and the student embeds only 130 \(beyond are '~'\); give"):
        check_vocabulary(tokenizer, SimpleNamespace(vocab_size=130), "student")


def test_holes_in_the_ids_are_no_obstacle(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    del content["model"]["vocab"]["A"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    hole = next(i for i in range(VOCAB_SIZE) if i not in tokenizer.pieces())
    assert tokenizer.vocab_size == VOCAB_SIZE
    assert tokenizer.decode_response([*tokenizer.encode("b"), hole, *tokenizer.encode("c")]) == "bc"
