"""Tokenizers: Hugging Face folders, bare sentencepiece models, templates, end ids, and two vocabularies compared."""

import json
import shutil

import pytest
import sentencepiece
from tiny_models import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, make_tokenizer

from megatron_tropd.errors import UserError
from megatron_tropd.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, check_compatible, load_tokenizer
from megatron_tropd.types import Prompt

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
TEXT = "The quick brown fox jumps over 13 lazy dogs"


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
    assert ids == [1, *tokenizer.encode(TEXT), 2, *tokenizer.encode("The")]


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
