"""Which ids end the responses of two models, and which of them are one event, from the files of both."""

import json
import logging

import pytest
from support.tiny_models import EOS_ID, VOCAB_SIZE, make_model, make_tokenizer
from support.tiny_tokenizers import write_llama
from tokenizers import AddedToken

from megatron_tropd.recipe import load_recipe
from megatron_tropd.rollout.endings import Endings, find_endings, find_turn_end
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt

START, END = VOCAB_SIZE, VOCAB_SIZE + 1
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _folder(path, eos, template=None, size=VOCAB_SIZE, added=("<|im_start|>", "<|im_end|>"), file="generation_config"):
    """Write a model's files without weights; `eos` is what `file` names."""
    tokenizer = make_tokenizer(size)
    tokenizer.add_tokens([AddedToken(piece, special=True) for piece in added])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    config = make_model("llama", vocab_size=VOCAB_SIZE + 9).config
    config.eos_token_id = None
    config.save_pretrained(path)
    content = json.loads((path / "config.json").read_text()) if file == "config" else {}
    (path / f"{file}.json").write_text(json.dumps({**content, "eos_token_id": eos}))
    return path


def _find(tmp_path, *keys, role="student"):
    paths = [f"{r}.hf_path={tmp_path / r}" for r in ("student", "teacher") if (tmp_path / r).exists()]
    recipe = load_recipe(None, [*paths, *keys])
    tokenizer = load_tokenizer(recipe.tokenizer.path or tmp_path / role, recipe.tokenizer.chat_template)
    return find_endings(recipe, role, tokenizer)


@pytest.fixture
def pair(tmp_path):
    """Models that end with ids 2 and 7, and 2 and 9."""
    _folder(tmp_path / "student", 7)
    _folder(tmp_path / "teacher", [9], file="config")
    return tmp_path


def test_the_ids_of_both_models_end_responses_and_are_one_event(pair):
    found = _find(pair)
    assert (found.eos, found.event, found.stop_ids) == ({2, 7, 9}, (2, 7, 9), set())
    assert "config.json" in found.origins[9]
    assert "teacher" in found.origins[9]
    assert "student" in found.origins[7]
    assert _find(pair, role="teacher").eos == {2, 7, 9}
    assert _find(pair, "tokenizer.check_compatibility=false") == found


def test_models_that_end_alike_have_nothing_to_merge(tmp_path):
    _folder(tmp_path / "student", [2, 7])
    _folder(tmp_path / "teacher", [7])
    assert (_find(tmp_path).eos, _find(tmp_path).event) == ({2, 7}, ())


def test_a_model_alone_ends_at_its_own_ids(tmp_path, caplog):
    _folder(tmp_path / "student", 7)
    assert (_find(tmp_path).eos, _find(tmp_path).event) == ({2, 7}, ())
    found = _find(tmp_path, f"teacher.hf_path={tmp_path / 'nowhere'}")  # on a machine that has only the student
    assert found.eos == {2, 7}
    assert "the teacher's end-of-text ids are not known" in caplog.text


def test_field_cases_a3_ids_are_merged_where_the_pieces_agree(tmp_path, caplog):
    _folder(tmp_path / "student", 7, added=("<|im_start|>", "<|im_end|>"))
    _folder(tmp_path / "teacher", [9, END, END + 1], added=("<|im_start|>", "<|other|>", "<|third|>"))
    found = _find(tmp_path, "tokenizer.check_compatibility=false")
    assert (found.eos, found.event) == ({2, 7, 9}, (2, 7, 9))
    assert f"id {END} (" in caplog.text
    assert "ends no response: '<|im_end|>' in the run's vocabulary, '<|other|>' in the teacher's" in caplog.text
    assert "beyond the run's vocabulary, '<|third|>' in the teacher's" in caplog.text


def test_field_cases_a3_an_id_that_the_teacher_reads_otherwise_ends_but_is_no_part_of_the_event(tmp_path):
    _folder(tmp_path / "student", [7, END])
    _folder(tmp_path / "teacher", 9, added=("<|im_start|>", "<|other|>"))
    found = _find(tmp_path, "tokenizer.check_compatibility=false")
    assert (found.eos, found.event) == ({2, 7, 9, END}, (2, 7, 9))


def test_field_cases_a3_a_teacher_without_a_tokenizer_is_not_guessed_at(pair, caplog):
    for file in (pair / "teacher").glob("*token*"):
        file.unlink()
    found = _find(pair, "tokenizer.check_compatibility=false")
    assert (found.eos, found.event) == ({2, 7}, ())
    assert "id 9" in caplog.text
    assert "unknown without a tokenizer there" in caplog.text


def test_another_tokenizer_brings_its_ids_and_the_students_stay(tmp_path):
    _folder(tmp_path / "student", 7)
    _folder(tmp_path / "teacher", [9, END], template=CHATML)
    path = f"tokenizer.path={tmp_path / 'teacher'}"
    found = _find(tmp_path, path)
    assert found.eos == {2, 7, 9, END}
    assert found.event == (2, 7, 9, END)
    for file in (tmp_path / "student").glob("*token*"):
        file.unlink()
    alone = _find(tmp_path, path)  # without a tokenizer in the recipe, it is the student's
    assert (alone.eos, alone.event) == (found.eos, found.event)


def test_field_cases_a4_special_stops_end_and_are_exported_but_not_merged(pair):
    found = _find(pair, 'rollout.stop=["<|im_end|>","\\n","</s>"]')
    assert (found.eos, found.event) == ({2, 7, 9}, (2, 7, 9))
    assert found.stop_ids == {END, EOS_ID}
    found.finish_folder(pair / "student", load_recipe(None), load_tokenizer(pair / "student"))
    written = json.loads((pair / "student/generation_config.json").read_text())
    assert written["eos_token_id"] == [7, 2, 9, END]
    assert _find(pair).eos == {2, 7, 9, END}  # an evaluation of the checkpoint ends there without the recipe's stop


@pytest.mark.parametrize("suffix", ["", " ", "\n"])
def test_what_the_template_writes_after_a_turn_ends_a_written_response(tmp_path, suffix):
    template = CHATML.replace("m['content'] + '<", f"m['content'] + {suffix!r} + '<")
    folder = _folder(tmp_path / "student", 7, template=template)
    tokenizer = load_tokenizer(folder)
    assert find_turn_end(tokenizer) == END
    found = _find(tmp_path)
    assert found.eos == {2, 7, END}
    assert found.eos_after(Prompt("0", messages=[]), tokenizer) == END
    assert found.eos_after(Prompt("0", text="a"), tokenizer) == EOS_ID


@pytest.mark.parametrize(
    "template",
    [
        *(None, "{{ raise_exception('no') }}", "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}",  # as GLM-4's
        "{% for m in messages %}{{ bos_token + m['content'] }}{% endfor %}",
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_end|>' + m['content'] }}{% endif %}{% endfor %}",
    ],
)
def test_templates_that_write_no_end_leave_the_tokenizers_own(tmp_path, template):
    tokenizer = load_tokenizer(_folder(tmp_path / "student", 7, template=template))
    assert find_turn_end(tokenizer) is None
    assert _find(tmp_path).eos_after(Prompt("0", messages=[]), tokenizer) == EOS_ID


def test_a_template_with_a_long_system_prompt_is_read_at_once(tmp_path, monkeypatch):
    system = "{{ '<|im_start|>system\n" + "You give the answer. " * 250 + "<|im_end|>\n' }}"  # 5000 tokens
    tokenizer = load_tokenizer(_folder(tmp_path / "student", 7, system + CHATML))
    decode, decoded = tokenizer.decode, []
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    assert find_turn_end(tokenizer) == END
    assert sum(decoded) < 50 * 5000


def test_a_turn_that_ends_with_a_token_that_no_file_names_is_an_end_of_the_teachers(tmp_path):
    """As Llama-3's first release: its files named <|end_of_text|> alone, and it ended turns with <|eot_id|>."""
    _folder(tmp_path / "student", 2)
    _folder(tmp_path / "teacher", 2, template=CHATML)
    found = _find(tmp_path)
    assert (found.eos, found.event) == ({2, END}, (2, END))


def test_ids_outside_of_the_vocabulary_are_named_and_dropped(tmp_path, caplog):
    _folder(tmp_path / "student", [7, 5000])
    assert _find(tmp_path).eos == {2, 7}
    assert "the student's end-of-text id 5000" in caplog.text
    assert "beyond the run's vocabulary" in caplog.text


def test_every_id_is_said_with_where_it_comes_from(pair, caplog):
    with caplog.at_level(logging.INFO):
        _find(pair)
    line = next(line for line in caplog.messages if line.startswith("responses end at"))
    assert "7 '" in line
    assert str(pair / "teacher" / "config.json") in line


def test_endings_of_a_tokenizer_alone(tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path / "student", [7, 9]))
    assert Endings.of(tokenizer).eos == {2, 7, 9}
    assert not Endings.of(tokenizer).end_of_text()


def test_field_cases_a1_what_would_change_greedy_texts_is_left_out_of_an_exported_folder(tmp_path, caplog):
    folder = _folder(tmp_path / "student", [7, 2])
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_new_tokens": 2048}
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1}
    penalties = {"repetition_penalty": 1.05, "stop_strings": ["x"], "min_length": 3}
    config = {"eos_token_id": [7, 2], "pad_token_id": 3, **sampling, **neutral, **penalties}
    (folder / "generation_config.json").write_text(json.dumps(config))
    recipe = load_recipe(None, [f"student.hf_path={folder}"])
    tokenizer = load_tokenizer(folder)
    caplog.set_level(logging.INFO)
    find_endings(recipe, "student", tokenizer).finish_folder(folder, recipe, tokenizer)
    written = json.loads((folder / "generation_config.json").read_text())
    assert written == {"eos_token_id": [7, 2], "pad_token_id": 3, **sampling, **neutral}
    assert "is saved without repetition_penalty=1.05, min_length=3, stop_strings=['x']" in caplog.text


@pytest.mark.parametrize("legacy", [True, False])
def test_field_cases_a14_an_exported_folder_gives_transformers_the_ids_of_the_run(tmp_path, legacy):
    from transformers import AutoTokenizer

    folder = write_llama(tmp_path / "student", legacy, "LlamaTokenizerFast")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 500, "eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}[INST]  {{ messages[0]['content'] }} [/INST]")
    recipe = load_recipe(None, [f"student.hf_path={folder}"])
    run = load_tokenizer(folder)
    find_endings(recipe, "student", run).finish_folder(folder, recipe, run)
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello world", " two  spaces", "def f(x):\n    return x", "</s> a"):
        messages = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == run.encode_prompt(Prompt("0", messages=messages))
