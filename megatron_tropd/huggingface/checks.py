"""Compares a Hugging Face folder's tensors with its config.json: names, whole shapes, kinds of numbers, tied weights.

Only headers are read, except for a tied output layer that the files store a second time.

    check_files("models/Llama-3.1-8B", load_hf_config("models/Llama-3.1-8B"))     # raises UserError
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.config import has_qk_norm, has_qkv_bias, head_dim
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.huggingface.files import SafetensorsFolder
from megatron_tropd.huggingface.mapping import expert_names, router_name
from megatron_tropd.huggingface.quantization import refuse_quantised_tensors
from megatron_tropd.huggingface.tensor_dtypes import same_bits

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_COMPARED_ROWS = 8192
Shape = tuple[int, ...]
# What wrappers leave in the names, and how to save a model without it.
_WRAPPERS = {
    "lora_": "an adapter that is not merged: merge_and_unload() with peft and save_pretrained the result",
    ".base_layer.": "an adapter that is not merged: merge_and_unload() with peft and save_pretrained the result",
    "base_model.model.": "peft's names: merge_and_unload() with peft and save_pretrained the result",
    "_orig_mod.": "torch.compile's names: save model._orig_mod, or rename the tensors without `_orig_mod.`",
    "_fsdp_wrapped_module.": "FSDP's names: gather the full state with FSDP's own functions and save that",
    "_checkpoint_wrapped_module.": "names of activation checkpointing: save the model without its wrapper",
    "language_model.": "a model of text and images: save its language model alone",
}


def check_files(hf_path: str | Path, hf_config: Any) -> None:
    """Raise UserError unless a folder's files hold exactly the tensors that its config says."""
    with SafetensorsFolder(hf_path, hf_config.model_type) as folder:
        check_tensors(folder, hf_config)


def check_tensors(folder: SafetensorsFolder, hf_config: Any) -> None:
    """Raise UserError unless an opened folder holds exactly the tensors that `hf_config` says."""
    names = folder.names()
    _refuse_wrapped(folder.path, names)
    refuse_quantised_tensors(folder.path, ((name, folder.dtype_name(name)) for name in sorted(names)))
    shapes = {name: folder.shape(name) for name in names}
    expected = dict(expected_shapes(hf_config))
    if hf_config.tie_word_embeddings and _OUTPUT in shapes:
        expected[_OUTPUT] = expected[_EMBEDDING]
    if shapes != expected:
        raise UserError(f"{folder.path}{_mismatch(shapes, expected, hf_config)}")
    if hf_config.tie_word_embeddings and _OUTPUT in shapes:
        _refuse_second_output(folder)


def expected_shapes(hf_config: Any) -> Iterator[tuple[str, Shape]]:
    """Yield name and whole shape of every tensor that a model of this config has."""
    width, heads, groups = hf_config.hidden_size, hf_config.num_attention_heads, hf_config.num_key_value_heads
    head, experts = head_dim(hf_config), experts_of(hf_config)
    yield _EMBEDDING, (hf_config.vocab_size, width)
    yield "model.norm.weight", (width,)
    if not hf_config.tie_word_embeddings:
        yield _OUTPUT, (hf_config.vocab_size, width)
    for i in range(hf_config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{layer}{norm}.weight", (width,)
        for p, count in (("q", heads), ("k", groups), ("v", groups)):
            yield f"{layer}self_attn.{p}_proj.weight", (count * head, width)
            if has_qkv_bias(hf_config):
                yield f"{layer}self_attn.{p}_proj.bias", (count * head,)
            if p != "v" and has_qk_norm(hf_config):
                yield f"{layer}self_attn.{p}_norm.weight", (head,)
        yield f"{layer}self_attn.o_proj.weight", (width, heads * head)
        if experts is None or not experts.layers[i]:
            ffn = hf_config.intermediate_size
            names = [(f"mlp.{p}_proj.weight", shape) for p, shape in _mlp(ffn, width).items()]
        else:
            names = [(router_name(hf_config.model_type), (experts.count, width))]
            sources = expert_names(hf_config.model_type)
            assert sources is not None  # its family has experts
            for e in range(experts.count):
                shapes = _mlp(experts.ffn, width).values()
                names += [(name.format(e=e), shape) for name, shape in zip(sources, shapes, strict=True)]
        yield from ((layer + name, shape) for name, shape in names)


def _mlp(ffn: int, width: int) -> dict[str, Shape]:
    return {"gate": (ffn, width), "up": (ffn, width), "down": (width, ffn)}


def _refuse_wrapped(path: Path, names: set[str]) -> None:
    for mark, remedy in _WRAPPERS.items():
        found = [name for name in names if mark in name]
        if found:
            raise UserError(f"{path}: the tensor {min(found)} carries {remedy}.")
    if _EMBEDDING in names:
        return
    for name in sorted(names):
        if name.startswith("module."):
            raise UserError(f"{path}: the tensor {name} carries a wrapper's name: save model.module instead.")
    if "embed_tokens.weight" in names:
        raise UserError(
            f"{path}: the tensors lack the prefix `model.` (embed_tokens.weight): they were saved of the model without "
            "its output layer. Load the original with transformers' AutoModelForCausalLM and save_pretrained that."
        )


def _mismatch(shapes: dict[str, Shape], expected: dict[str, Shape], hf_config: Any) -> str:
    """Say which tensors do not fit the config and which field of it would explain them."""
    remedy = _explanation(shapes, hf_config)
    missing, unknown = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if wrong:
        more = f" (and {len(wrong) - 1} more tensors do not fit)" if len(wrong) > 1 else ""
        what = f": {wrong[0]} has shape {shapes[wrong[0]]}, expected {expected[wrong[0]]} by config.json{more}; "
    elif unknown:
        biases = sum(name.endswith(".bias") for name in unknown)
        kind = f", {biases} of them biases" if biases else ""
        what = (
            f" holds {len(unknown)} tensors that a {hf_config.model_type} model of {hf_config.num_hidden_layers} "
            f"layers with this config.json does not have{kind}, first {unknown[0]}; "
        )
    else:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        what = f" lacks the tensor {missing[0]}{more}; "
    return what + (remedy or "config.json is not of these weights: take both from the same model.")


def _explanation(shapes: dict[str, Shape], hf_config: Any) -> str | None:
    """Return the one change of a field of the config that makes all tensors fit, as a remedy; None if there is none."""
    for changes in _candidates(shapes, hf_config):
        changed = copy.copy(hf_config)
        try:
            for field, value in changes.items():
                setattr(changed, field, value)
            fits = dict(expected_shapes(changed)) == shapes
        except (ArithmeticError, IndexError, TypeError, ValueError):
            continue
        if fits:
            fields = " and ".join(f"{field}={str(value).lower()}" for field, value in changes.items())
            says = " and ".join(f"{field}={getattr(hf_config, field, None)}" for field in changes)
            return (
                f"config.json says {says}: set {fields} there if these are the weights that are meant, else take the "
                "weights and config.json from the same model."
            )
    return None


def _candidates(shapes: dict[str, Shape], hf_config: Any) -> Iterator[dict[str, Any]]:
    """Yield changes of the config that the shapes suggest."""

    def size(ending: str, axis: int) -> int:
        return next((s[axis] for n, s in sorted(shapes.items()) if n.endswith(ending) and len(s) > axis), 0)

    heads, head = hf_config.num_attention_heads, head_dim(hf_config)
    q, k = size("q_proj.weight", 0), size("k_proj.weight", 0)
    layers = [int(match[1]) for name in shapes if (match := _LAYER.match(name))]
    single = {
        "vocab_size": size(_EMBEDDING, 0),
        "num_hidden_layers": 1 + max(layers, default=0),
        "tie_word_embeddings": _OUTPUT not in shapes,
        "hidden_size": size(_EMBEDDING, 1),
        "num_attention_heads": q // head,
        "num_key_value_heads": k // head,
        "head_dim": q // heads,
    }
    dense, sparse = size(".mlp.gate_proj.weight", 0), size("experts.0.gate_proj.weight", 0)
    single["intermediate_size"] = size("experts.0.w1.weight", 0) or dense
    if experts_of(hf_config) is not None:
        name = "num_local_experts" if hf_config.model_type == "mixtral" else "num_experts"
        single[name] = size(router_name(hf_config.model_type), 0)
        single["moe_intermediate_size"] = sparse
    differing = {f: v for f, v in single.items() if (v or v is False) and v != getattr(hf_config, f, None)}
    yield from ({field: value} for field, value in differing.items())
    pairs = [f for f in differing if f not in ("num_attention_heads", "num_key_value_heads")]
    yield from ({a: differing[a], b: differing[b]} for i, a in enumerate(pairs) for b in pairs[i + 1 :])


def _refuse_second_output(folder: SafetensorsFolder) -> None:
    """Refuse a tied model whose files hold another output layer: it would be dropped without a word."""
    rows = folder.shape(_EMBEDDING)[0]
    for start in range(0, rows, _COMPARED_ROWS):
        part = slice(start, min(start + _COMPARED_ROWS, rows))
        a, b = folder.read(_EMBEDDING, part), folder.read(_OUTPUT, part)
        same = torch.equal(a.double(), b.double()) if a.dtype != b.dtype else same_bits(a, b)
        if not same:
            raise UserError(
                f"{folder.path}: config.json says tie_word_embeddings=true, and the files hold another {_OUTPUT} than "
                f"{_EMBEDDING} (rows from {start} on). Set tie_word_embeddings=false if the output layer was trained "
                f"by itself; if not, save the folder again without {_OUTPUT}."
            )
