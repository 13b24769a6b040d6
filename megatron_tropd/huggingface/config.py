"""Reads config.json of a Hugging Face folder under every transformers; refuses what Megatron would not reproduce.

A config that is unreadable, is quantised, or has impossible sizes or unknown parts raises one UserError.

    hf_config = load_hf_config("models/Llama-3.1-8B")
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.huggingface.fields import FOREIGN_FIELDS, NEUTRAL_FIELDS, SIZE_FIELDS, UNDERSTOOD_FIELDS
from megatron_tropd.huggingface.quantization import refuse_quantised_config

SUPPORTED = ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral")
_ROPE_KINDS = ("default", "linear", "llama3")
_EXPERT_SIZES = {
    "mixtral": ("num_local_experts", "num_experts_per_tok"),
    "qwen3_moe": ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"),
}
_EXTENDED_BIASES = {"qwen2": "qkv_bias"}  # of the foreign fields, those that repeat what the architecture does anyway


def load_hf_config(hf_path: str | Path) -> Any:
    """Read config.json of a Hugging Face folder as transformers' config object.

    Raises:
        UserError: it is missing, damaged, quantised, of an unsupported architecture, or of impossible sizes.
    """
    file = Path(hf_path) / "config.json"
    raw = read_config(file)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in SUPPORTED:
        raise UserError(f"{file}: model_type {model_type!r} is not supported; expected one of {', '.join(SUPPORTED)}.")
    refuse_quantised_config(file, raw)
    _check_raw_sizes(file, raw)
    _refuse_contradiction(file, raw)
    config = _parse(file, model_type, portable_config(raw))
    _refuse_unsupported(file, config, raw)
    _check_sizes(file, config)
    _check_rope(file, config, raw)
    return config


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a config.json; UserError where it cannot be read or is no object."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}); give the folder of a Hugging Face model.") from error
    if not isinstance(raw, dict):
        raise UserError(f"{file} holds {type(raw).__name__}, no object; give the folder of a Hugging Face model.")
    return raw


def portable_config(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a config that transformers 4 and 5 read alike: rope and dtype under the names of both.

    transformers 4 does not know version 5's `rope_parameters` and would rotate with its own default base.
    """
    config = dict(raw)
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if config.get("rope_theta") is None:
            config["rope_theta"] = rope.get("rope_theta", 10000.0)
        if _kind(scaling) != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = scaling
    dtype = config.get("dtype") or config.get("torch_dtype")
    if isinstance(dtype, str):
        config["torch_dtype"] = config["dtype"] = dtype
    return config


def _parse(file: Path, model_type: str, raw: dict[str, Any]) -> Any:
    """Build transformers' config object; whatever it rejects becomes one line."""
    from transformers import AutoConfig

    fields = {key: value for key, value in raw.items() if key not in ("model_type", "auto_map")}
    if _reads_rope_parameters():
        if isinstance(fields.get("rope_parameters"), dict) and fields["rope_parameters"]:
            fields = {key: value for key, value in fields.items() if key not in ("rope_theta", "rope_scaling")}
        fields.pop("torch_dtype", None)
    else:
        fields.pop("dtype", None)
        fields.pop("rope_parameters", None)
    try:
        return type(AutoConfig.for_model(model_type)).from_dict({**fields, "model_type": model_type})
    except Exception as error:  # of many kinds: the versions of transformers check with different means
        raise UserError(f"{file} is rejected by transformers: {_one_line(error)}. Correct the field.") from error


def _reads_rope_parameters() -> bool:
    import transformers

    return int(transformers.__version__.split(".")[0]) >= 5


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}").strip().rstrip(".")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _check_raw_sizes(file: Path, raw: dict[str, Any]) -> None:
    """Refuse sizes that are no positive whole numbers; those that are absent have transformers' defaults."""
    for key in (*SIZE_FIELDS, *_EXPERT_SIZES.get(raw["model_type"], ()), "head_dim"):
        optional = key in ("num_key_value_heads", "head_dim")  # null: as many as heads; hidden_size / heads
        if key in raw and not _is_count(raw[key]) and not (optional and raw[key] is None):
            raise UserError(f"{file}: {key}={raw[key]!r}, expected a positive whole number; correct it.")
    missing = [key for key in ("hidden_size", "num_hidden_layers", "num_attention_heads") if key not in raw]
    if missing:
        raise UserError(f"{file} lacks {missing[0]}; is it the whole config.json of the model?")
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    if not raw.get("head_dim") and width % heads:
        raise UserError(
            f"{file}: num_attention_heads={heads} does not divide hidden_size={width}; correct one of them, or give "
            "head_dim."
        )
    if (raw.get("head_dim") or width // heads) % 2:
        raise UserError(
            f"{file}: heads of {raw.get('head_dim') or width // heads} are not even, and halves of them are rotated; "
            "correct head_dim."
        )


def _refuse_contradiction(file: Path, raw: dict[str, Any]) -> None:
    """Refuse a rotary embedding under both versions' names that is not the same: transformers 4 and 5 would differ."""
    rope = raw.get("rope_parameters")
    for key in ("rope_parameters", "rope_scaling"):
        if raw.get(key) is not None and not isinstance(raw[key], dict):
            raise UserError(f"{file}: {key}={raw[key]!r}, expected an object or null; correct it.")
    if not rope:
        return
    theta, inner = raw.get("rope_theta"), rope.get("rope_theta")
    if theta is not None and inner is not None and theta != inner:
        raise UserError(f"{file}: rope_theta={theta} and rope_parameters.rope_theta={inner} contradict; keep one.")
    scaling = raw.get("rope_scaling")
    if scaling and _scaling(scaling) != _scaling(rope):
        raise UserError(f"{file}: rope_scaling={scaling} and rope_parameters={rope} contradict; keep one of them.")


def _kind(rope: dict[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    return {**{k: v for k, v in rope.items() if k not in ("type", "rope_theta")}, "rope_type": _kind(rope)}


def _check_sizes(file: Path, config: Any) -> None:
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{file}: num_key_value_heads={groups} does not divide num_attention_heads={heads}; correct one of them."
        )
    eps = config.rms_norm_eps
    if not isinstance(eps, (int, float)) or isinstance(eps, bool) or not 0 <= eps < 1:
        raise UserError(f"{file}: rms_norm_eps={eps!r}, expected a number such as 1e-06; correct it.")
    if not isinstance(config.tie_word_embeddings, bool):
        raise UserError(f"{file}: tie_word_embeddings={config.tie_word_embeddings!r}, expected true or false.")
    if config.model_type == "qwen3_moe":
        _check_sparse_layers(file, config)
    experts = experts_of(config)
    if experts is not None and experts.per_token > experts.count:
        raise UserError(
            f"{file}: num_experts_per_tok={experts.per_token} is more than the {experts.count} experts; correct it."
        )


def _check_sparse_layers(file: Path, config: Any) -> None:
    layers = config.mlp_only_layers
    if not isinstance(layers, (list, tuple)) or not all(isinstance(i, int) for i in layers):
        raise UserError(f"{file}: mlp_only_layers={layers!r}, expected a list of layers' numbers; correct it.")
    if not isinstance(config.norm_topk_prob, bool):
        raise UserError(f"{file}: norm_topk_prob={config.norm_topk_prob!r}, expected true or false; correct it.")


def _refuse_unsupported(file: Path, config: Any, raw: dict[str, Any]) -> None:
    model_type = config.model_type
    kinds = [*(getattr(config, "layer_types", None) or ()), *_as_list(raw.get("layer_types"))]
    other = [kind for kind in kinds if kind != "full_attention"]
    unsupported = {
        "hidden_act": config.hidden_act not in ("silu", "swish"),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "attention_bias": model_type != "qwen2" and getattr(config, "attention_bias", False),
        "use_sliding_window": _has_window(config),
        "sliding_window": model_type == "mixtral" and config.sliding_window is not None,
        "layer_types": bool(other),
    }
    for key, refused in unsupported.items():
        if refused:
            value = other[0] if key == "layer_types" else getattr(config, key)
            raise UserError(f"{file}: {key}={value} is not supported for model_type {model_type}.")
    for key, neutral in FOREIGN_FIELDS.items():
        value = raw.get(key)
        if value is None or value in neutral or _EXTENDED_BIASES.get(model_type) == key:
            continue
        raise UserError(
            f"{file}: {key}={value!r} is not supported: it belongs to another architecture than {model_type}. Take the "
            "config.json that was published with the weights, or remove the field if they were trained without it."
        )
    read_and_unknown = _unknown_fields(config, raw)
    if read_and_unknown:
        key = read_and_unknown[0]
        raise UserError(
            f"{file}: {key}={raw[key]!r} is not supported: transformers' {model_type} reads it and Megatron's model "
            "here does not."
        )


def _has_window(config: Any) -> bool:
    """Whether any layer of a Qwen has an attention window: those from max_window_layers on, if they are used at all."""
    first = getattr(config, "max_window_layers", None)
    return bool(getattr(config, "use_sliding_window", False)) and (first is None or first < config.num_hidden_layers)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _unknown_fields(config: Any, raw: dict[str, Any]) -> list[str]:
    """Return fields of the file, not at the class's default, that transformers' model reads and nothing here does."""
    from transformers import AutoConfig

    spec = importlib.util.find_spec(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    names = re.findall(r"config\.(\w+)|getattr\((?:self\.)?config, *\"(\w+)\"", source)
    read = {a or b for a, b in names} - NEUTRAL_FIELDS - UNDERSTOOD_FIELDS
    default = AutoConfig.for_model(config.model_type)
    return sorted(key for key in read & raw.keys() if raw[key] != getattr(default, key, None))


def head_dim(hf_config: Any) -> int:
    """Return the width of one attention head."""
    return getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads


def has_qk_norm(hf_config: Any) -> bool:
    """Whether queries and keys are normed, head by head."""
    return hf_config.model_type in ("qwen3", "qwen3_moe")


def has_qkv_bias(hf_config: Any) -> bool:
    """Whether the projections to queries, keys and values have biases."""
    return hf_config.model_type == "qwen2"


def rope_parameters(hf_config: Any) -> dict[str, Any]:
    """Return rope_theta, rope_type and what scaling takes, whose place depends on the version of transformers."""
    parameters = dict(getattr(hf_config, "rope_parameters", None) or getattr(hf_config, "rope_scaling", None) or {})
    parameters.setdefault("rope_theta", getattr(hf_config, "rope_theta", 10000.0))
    parameters["rope_type"] = parameters.get("rope_type") or parameters.get("type") or "default"
    parameters.pop("type", None)
    return parameters


def inverse_frequencies(hf_config: Any) -> torch.Tensor | None:
    """Return the scaled inverse frequencies [head_dim / 2] as transformers computes them; None without scaling."""
    kind = rope_parameters(hf_config)["rope_type"]
    if kind == "default":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](hf_config, torch.device("cpu"))
    return frequencies.float()


def _check_rope(file: Path, config: Any, raw: dict[str, Any]) -> None:
    """Refuse kinds of rope scaling that Megatron's model does not have, and numbers that are none."""
    rope = rope_parameters(config)
    kind = rope["rope_type"]
    if kind not in _ROPE_KINDS:
        raise UserError(f"{file}: rope scaling {kind!r} is not supported; expected {', '.join(_ROPE_KINDS)}.")
    written = [raw.get(name) or {} for name in ("rope_parameters", "rope_scaling")]
    for key, value in (item for fields in (rope, *written) for item in fields.items()):
        if isinstance(value, dict) or (key in ("mrope_section", "partial_rotary_factor") and value not in (None, 1)):
            raise UserError(f"{file}: {key}={value!r} of the rotary embedding is not supported.")
    numbers = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "llama3": (
            *("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
        ),
    }
    for key in numbers[kind]:
        value = rope.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise UserError(
                f"{file}: {key}={value!r} of the rotary embedding ({kind}), expected a positive number; correct it."
            )
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise UserError(
            f"{file}: low_freq_factor={rope['low_freq_factor']} is not below high_freq_factor="
            f"{rope['high_freq_factor']} of the rotary embedding; correct them."
        )
