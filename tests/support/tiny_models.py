"""Random Hugging Face models of every supported architecture, each folder complete with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

BOS_ID, EOS_ID, PAD_ID = 1, 2, 3
VOCAB_SIZE = 131  # odd: no tensor-parallel size divides it
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_SPARSE = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    **{"mlp_only_layers": [1], "tie_word_embeddings": False, "head_dim": 16},  # one of the four layers is dense
}
_KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama3_rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": _LLAMA3, "rope_scaling": _LLAMA3}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, _SPARSE),
}
KINDS = tuple(_KINDS)


def make_model(kind: str, dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB_SIZE, seed: int = 0, **overrides):
    """Return a random model of 4 layers whose norms and biases are not their neutral selves."""
    config_class, model_class, fields = _KINDS[kind]
    if int(transformers.__version__.split(".")[0]) < 5 and "rope_parameters" in (rope := {**fields, **overrides}):
        scaling = dict(rope["rope_parameters"])  # by the names of transformers 4
        names = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
        overrides = {k: v for k, v in overrides.items() if k != "rope_parameters"} | names
        fields = {k: v for k, v in fields.items() if k != "rope_parameters"}
    config = config_class(
        **{
            **{"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256},
            **{"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID},
            **{"initializer_range": 0.2},  # attention and MLP weigh as much as the embedding, so mistakes show
            **fields,
            **overrides,
        }
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.to(dtype)


def load_transformers(folder: str | Path, dtype: torch.dtype | str = "auto"):
    """Load a folder with transformers, whose name for the dtype depends on its version."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    key = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    return AutoModelForCausalLM.from_pretrained(str(folder), **{key: dtype}).eval()


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges (one token an ASCII character), BOS before a text, a chat template.

    The default size holds ids 4 .. 130 for the bytes 0 .. 126.
    """
    # Byte-level tokenizers write printable bytes as themselves and the others, in order, from U+0100 on.
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(chr(256 + byte) for byte in range(33)), *map(chr, range(33, 127))]
    pieces += [f"<filler{i}>" for i in range(vocab_size - len(pieces))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def write_model(
    folder: str | Path,
    kind: str,
    dtype: torch.dtype = torch.float32,
    vocab_size: int = VOCAB_SIZE,
    max_shard_size: str = "1GB",
    embeddings: int | None = None,
    **overrides,
) -> str:
    """Write a model of `kind` and its tokenizer into `folder`; `overrides` are fields of its config (and `seed`).

    `embeddings`: as many rows as the model shall have, where they are more than the tokenizer has ids.
    """
    made = make_model(kind, dtype, embeddings or vocab_size, **overrides)
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    make_tokenizer(vocab_size).save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID).save_pretrained(folder)
    return str(folder)
