"""Random Llamas of real sizes, cut to a few layers, written in seconds: weights are drawn on the device.

Both models of a pair have one tokenizer with as many entries as they have embeddings, and one id in a hundred ends a
text, so that random responses end at ragged lengths; `plain_tokenizer` is the same with a single end.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.tiny_models import BOS_ID, EOS_ID, PAD_ID, make_tokenizer
from transformers import GenerationConfig, LlamaConfig

LLAMA_8B = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"num_hidden_layers": 4, "vocab_size": 128256, "max_position_embeddings": 8192},
}
SMALL = {
    **{"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "vocab_size": 640, "max_position_embeddings": 256},
}
_ENDS_EVERY = 100  # ids


def make_pair(folder: Path, small: bool, device: str, dtype: torch.dtype) -> Path:
    """Write `student`, `teacher`, `plain_tokenizer` and `prompts.jsonl` into `folder`, unless they are there."""
    if (folder / "prompts.jsonl").exists():
        return folder
    sizes = SMALL if small else LLAMA_8B
    tokenizer = make_tokenizer(sizes["vocab_size"])
    ends = [EOS_ID, *range(200, sizes["vocab_size"], _ENDS_EVERY)]
    for seed, role in enumerate(("student", "teacher")):
        _write_weights(folder / role, _config(sizes), seed, device, dtype)
        tokenizer.save_pretrained(folder / role)
        GenerationConfig(bos_token_id=BOS_ID, eos_token_id=ends, pad_token_id=PAD_ID).save_pretrained(folder / role)
    tokenizer.save_pretrained(folder / "plain_tokenizer")
    longest = 16 if small else 64
    _write_prompts(folder / "prompts.jsonl", count=64, shortest=longest // 2, longest=longest)
    return folder


def _config(sizes: dict[str, int]) -> LlamaConfig:
    return LlamaConfig(
        **sizes,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )


def _write_weights(folder: Path, config: LlamaConfig, seed: int, device: str, dtype: torch.dtype) -> None:
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        return drawn.cpu()

    h, ffn, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = h // config.num_attention_heads * config.num_key_value_heads
    ones = torch.ones(h, dtype=dtype)
    weights = {"model.embed_tokens.weight": draw(vocab, h), "lm_head.weight": draw(vocab, h)}
    weights["model.norm.weight"] = ones.clone()
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for name, shape in {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}.items():
            weights[f"{layer}.self_attn.{name}_proj.weight"] = draw(*shape)
        for name, shape in {"gate": (ffn, h), "up": (ffn, h), "down": (h, ffn)}.items():
            weights[f"{layer}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = ones.clone()
    folder.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write_prompts(path: Path, count: int, shortest: int, longest: int) -> None:
    """Write prompts of random letters, a token each; BOS comes before them, and the first is the longest."""
    letters = random.Random(0)
    lengths = [longest, *(letters.randint(shortest, longest) for _ in range(count - 1))]
    lines = [{"text": "".join(letters.choices("abcdefghij", k=length - 1))} for length in lengths]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
