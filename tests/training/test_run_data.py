"""What a run reads before its models: limits and the keys that change them, weights, guidance, budgets."""

from __future__ import annotations

import json

import pytest
from support.tiny_models import make_tokenizer

from megatron_tropd.errors import UserError
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.recipe import load_recipe
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.tokenizers.tokenizer import HuggingFaceTokenizer
from megatron_tropd.training.run_data import load_run_data

TOKENIZER = HuggingFaceTokenizer(make_tokenizer(), set())


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(tmp_path, rows, *overrides, context=256):
    path = write(tmp_path / "prompts.jsonl", rows)
    recipe = load_recipe(None, [f"data.prompts={path}", "guidance.schedule=none", *overrides])
    objective = build_objective(recipe.objective, recipe.guidance, 1)
    return load_run_data(recipe, TOKENIZER, Endings.of(TOKENIZER), objective, context)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as error:
        load(*arguments, **options)
    return str(error.value)


ROWS = [{"text": "x" * length} for length in (5, 90, 20)]


def test_field_cases_b9_the_message_names_the_limit_and_the_keys_that_help(tmp_path):
    message = refusal(tmp_path, ROWS, "rollout.max_new_tokens=200")
    assert "line 2: the prompt has 9" in message
    assert "more than the 56 allowed" in message
    assert "lower rollout.max_new_tokens=200, which leaves 56 of the context of 256 tokens" in message
    assert "(data.max_prompt_tokens can only lower the limit), or set data.skip_long_prompts=true" in message
    message = refusal(tmp_path, ROWS, "rollout.max_new_tokens=200", "data.max_prompt_tokens=100")
    assert "more than the 56 allowed" in message
    assert "data.max_prompt_tokens=100 is above that" in message
    message = refusal(tmp_path, ROWS, "rollout.max_new_tokens=100", "data.max_prompt_tokens=50")
    assert (
        "raise data.max_prompt_tokens=50 (up to 156, which rollout.max_new_tokens=100 leaves of the context" in message
    )
    assert "leaves no room for a prompt" in refusal(tmp_path, ROWS, "rollout.max_new_tokens=256")


def test_field_cases_b9_long_prompts_are_skipped_on_request(tmp_path):
    data = load(tmp_path, ROWS, "rollout.max_new_tokens=200", "data.skip_long_prompts=true")
    assert sorted(prompt.id for prompt in data.source.next(4)) == ["1", "1", "3", "3"]
    assert data.longest_prompt < 56
    message = refusal(tmp_path, ROWS[1:2], "rollout.max_new_tokens=200", "data.skip_long_prompts=true")
    assert "all 1 prompts have more than the 56 tokens allowed and were skipped" in message


def test_a_budget_below_the_longest_prompt_is_refused_in_large_sets_too(tmp_path):
    rows = [{"text": "x" * 30}] * 3000
    rows[1500] = {"text": "y" * 80}
    keys = ("rollout.max_new_tokens=20", "training.max_tokens_per_micro_batch=90")
    assert "use at least 10" in refusal(tmp_path, rows, *keys)
    assert load(tmp_path, rows, keys[0], "training.max_tokens_per_micro_batch=110").longest_prompt < 90


def test_prompts_without_a_response_are_named(tmp_path):
    rows = [{"id": "a", "text": "x", "teacher_response": "y"}, {"id": "b", "text": "z"}]
    keys = ("rollout.max_new_tokens=20", "guidance.schedule=cosine")
    assert "1 of 2 prompts have no teacher_response, the first is id 'b'" in refusal(tmp_path, rows, *keys)
    responses = write(tmp_path / "responses.jsonl", [{"id": "b", "teacher_response": "w"}])
    data = load(tmp_path, rows, *keys, f"guidance.responses={responses}")
    prompts = sorted(data.source.next(2), key=lambda prompt: prompt.id)
    assert data.guidance.prefixes(prompts, 0) == [TOKENIZER.encode_response(text, True) for text in ("y", "w")]


def test_weights_go_with_the_entries_of_prompts(tmp_path):
    paths = [
        str(write(tmp_path / f"{name}.jsonl", [{"id": f"{name}{i}", "text": "x"} for i in range(2)])) for name in "ab"
    ]
    keys = (f"data.prompts=[{','.join(paths)}]", "rollout.max_new_tokens=20")
    drawn = load(tmp_path, ROWS, *keys, "data.weights=[3,1]").source.next(8)
    assert [prompt.id[0] for prompt in drawn].count("a") == 6
    for weights in ("[1]", "[1,0]", "[1,-1]"):
        assert "expected one number above 0 for each of the 2 entries" in refusal(
            tmp_path, ROWS, *keys, f"data.weights={weights}"
        )
