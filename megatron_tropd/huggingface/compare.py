"""Compares two config.json files: do the models compute the same function of the same weights?

difference(load_hf_config("models/Llama-3.1-8B"), load_hf_config("checkpoints/llama8b/hf"))     # None
"""

from __future__ import annotations

from typing import Any

from megatron_tropd.huggingface.config import head_dim, rope_parameters
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.huggingface.fields import NEUTRAL_FIELDS, SIZE_FIELDS, UNDERSTOOD_FIELDS


def function_fields(hf_config: Any) -> dict[str, Any]:
    """Return every field that can change what the model computes, under one name whatever transformers wrote it."""
    fields = {k: v for k, v in hf_config.to_dict().items() if k not in NEUTRAL_FIELDS and v is not None}
    for name in ("rope_parameters", "rope_scaling", "rope_theta", "num_experts", "num_local_experts", "head_dim"):
        fields.pop(name, None)
    rope = rope_parameters(hf_config)
    if rope["rope_type"] == "default":
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    fields |= {f"rope {key}": float(v) if isinstance(v, int) else v for key, v in rope.items() if v is not None}
    experts = experts_of(hf_config)
    if experts is not None:
        fields["number of experts"] = experts.count
    fields["head_dim"] = head_dim(hf_config)
    fields["hidden_act"] = "silu"  # swish is another name of it, and all others are refused
    known = (*UNDERSTOOD_FIELDS, "head_dim", "hidden_act", "number of experts")
    unset: tuple[Any, ...] = (False, 0, [], {}, "")  # an absent field of another version
    return {k: v for k, v in fields.items() if k in known or k.startswith("rope ") or v not in unset}


def difference(ours: Any, theirs: Any) -> tuple[str, Any, Any] | None:
    """Return the first field in which two models' functions differ, with both values; None if there is none."""
    a, b = function_fields(ours), function_fields(theirs)
    order = {key: place for place, key in enumerate(("model_type", *SIZE_FIELDS))}
    for key in sorted(a.keys() | b.keys(), key=lambda key: (order.get(key, len(order)), key)):
        if a.get(key) != b.get(key):
            return key, a.get(key), b.get(key)
    return None
