"""Small trained tokenizers as folders: byte-level BPE with any pre-tokenizer, sentencepiece models and their likes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LINES = [
    *(f"The quick brown fox jumps over {n} lazy dogs; the answer is {n * 37}" for n in range(200)),
    *("Hello world, hello  there", "def f(x):\n    return x + 1", "[INST] Hello [/INST] Hi") * 20,
    *("中文字符 naïve café 🙂",) * 5,
]
# Llama-3's: digits in threes, which Qwen2's and GPT-2's split otherwise.
DIGITS_IN_THREES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS = "<|begin|>", "<|end|>"
CHAT = "{{ bos_token }}{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}"


def write_byte_level(folder: Path, tokenizer_class: str = "PreTrainedTokenizerFast", **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json of a byte-level BPE with 500 pieces."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(DIGITS_IN_THREES), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES,
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, tokenizer_class, {"bos_token": BOS, "eos_token": EOS, "chat_template": CHAT, **config})
    return folder


def write_llama(folder: Path, legacy: bool, tokenizer_class: str = "PreTrainedTokenizerFast") -> Path:
    """Write a tokenizer.json as Llama 2's: a space in front of every text, which decoding takes away."""
    model_file = train_sentencepiece(folder / "source")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    merges = sorted(
        (vocab[piece], piece[:cut], piece[cut:])
        for piece in vocab
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab and not piece.startswith("<")
    )
    model = models.BPE(vocab, [(a, b) for _, a, b in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, tokenizer_class, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return folder


def train_sentencepiece(folder: Path, **options: Any) -> Path:
    """Train a sentencepiece model (by default BPE as Llama's) and return its file, `tokenizer.model`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 420},
        **{"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 2, **options},
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), **settings
    )
    return folder / "tokenizer.model"


def write_pieces(folder: Path, tokenizer_class: str, config: dict[str, Any] | None = None, **options: Any) -> Path:
    """Write tokenizer.model and tokenizer_config.json, but no tokenizer.json."""
    train_sentencepiece(folder, **options)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_config(folder, tokenizer_class, {**names, **(config or {})})
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    """Set fields of tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _write_config(folder: Path, tokenizer_class: str, fields: dict[str, Any]) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class, **fields}))
