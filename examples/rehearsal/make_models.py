"""Make what `REHEARSAL=1 bash examples/distill_70b_to_8b.sh` runs on: both Llamas shrunk, prompts and problems.

The architectures are those of Llama-3.1-70B-Instruct and Llama-3.1-8B (heads, key/value groups, rope scaling, untied
embeddings, bfloat16 files, the tokenizers' special tokens; only the teacher has a chat template and ends its turns with
<|eot_id|>), with narrow heads, few layers and random weights. They know nothing: a rehearsal shows that the stages fit
together, not that anything is learned. Plain transformers, nothing of megatron_tropd.

    python examples/rehearsal/make_models.py --output runs/rehearsal/inputs
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BEGIN, END_OF_TEXT, END_OF_TURN = 256, 257, 260  # their ids follow the 256 bytes
VOCAB_SIZE = 256 + len(SPECIAL)
CHAT_TEMPLATE = (  # Llama-3's without its system prompt and tools
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Attention heads as in the originals, so that every TP up to 8 is the same; 8 and 4 layers instead of 80 and 32.
TEACHER = {"num_attention_heads": 64, "num_hidden_layers": 8, "hidden_size": 256, "intermediate_size": 896}
STUDENT = {"num_attention_heads": 32, "num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 448}


def make_tokenizer(is_instruct: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and Llama-3's special tokens."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(bytes_)}, merges=[]))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], BEGIN)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[4] if is_instruct else SPECIAL[1],
        chat_template=CHAT_TEMPLATE if is_instruct else None,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, sizes: dict[str, int], is_instruct: bool) -> None:
    """Write a random Llama and its tokenizer."""
    eos = [END_OF_TEXT, END_OF_TURN] if is_instruct else END_OF_TEXT
    config = LlamaConfig(
        **sizes,
        vocab_size=VOCAB_SIZE,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={**ROPE, "rope_theta": 500000.0},
        tie_word_embeddings=False,
        bos_token_id=BEGIN,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(bos_token_id=BEGIN, eos_token_id=eos)
    model.save_pretrained(folder)
    make_tokenizer(is_instruct).save_pretrained(folder)
    # Their names before transformers 5, which newer versions know as well.
    _patch(folder / "config.json", rope_theta=500000.0, rope_scaling=ROPE, torch_dtype="bfloat16")
    _patch(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _patch(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}, indent=2) + "\n")


def write_problems(path: Path, count: int, first: int, with_answers: bool) -> None:
    """Write sums to be done, one per line."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(first, first + count):
            record = {"id": f"sum-{n}", "messages": [{"role": "user", "content": f"What is {n} + {n + 3}?"}]}
            if with_answers:
                record["answer"] = str(2 * n + 3)
            file.write(json.dumps(record) + "\n")


def main() -> None:
    """Write everything under a temporary name and rename it when it is whole."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to make; nothing is done if it exists")
    output: Path = parser.parse_args().output
    if output.exists():
        return
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_model(temporary / "teacher", TEACHER, is_instruct=True)
    write_model(temporary / "student", STUDENT, is_instruct=False)
    write_problems(temporary / "prompts.jsonl", 6, first=0, with_answers=False)
    write_problems(temporary / "problems.jsonl", 2, first=100, with_answers=True)
    os.rename(temporary, output)


if __name__ == "__main__":
    main()
