"""Recognises folders of quantised weights, by config.json or by the names and dtypes of their tensors.

A quantised model is refused; the error names its method and how to get plain weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError

_METHODS = {
    "fp8": "FP8",
    "fbgemm_fp8": "FP8 (fbgemm)",
    "finegrained_fp8": "FP8",
    "compressed-tensors": "compressed-tensors",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "mxfp4": "MXFP4",
    "modelopt": "ModelOpt",
    "quanto": "quanto",
    "hqq": "HQQ",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "torchao": "torchao",
    "bitnet": "BitNet",
    "higgs": "HIGGS",
    "spqr": "SpQR",
    "vptq": "VPTQ",
    "quark": "Quark",
}
# Endings of tensors' names that only one method, or a few, writes; the first that is found names it.
_ENDINGS = {
    ".g_idx": "GPTQ",
    ".qzeros": "GPTQ or AWQ",
    ".qweight": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".nested_absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_2": "ModelOpt",
    ".input_scale": "FP8 or compressed-tensors",
    ".input_scale_ub": "FP8 (fbgemm)",
    ".activation_scale": "FP8",
    ".k_scale": "FP8",
    ".v_scale": "FP8",
    "_blocks": "MXFP4",
    "_scales": "MXFP4",
    ".scales": "GPTQ or AWQ",
    ".codebooks": "AQLM",
    ".W_q": "HQQ",
}
_FLOATS = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that plain weights have
_REMEDY = (
    "This package computes with plain weights: take the original bfloat16 or float16 folder that it was made from, or "
    "dequantise it with transformers (from_pretrained, model.dequantize(), save_pretrained)."
)


def refuse_quantised_config(file: Path, raw: dict[str, Any]) -> None:
    """Raise UserError where config.json names a quantisation, with the method."""
    for key in ("quantization_config", "compression_config", "quantization"):
        settings = raw.get(key)
        if not settings:
            continue
        method = settings if isinstance(settings, str) else ""
        if isinstance(settings, dict):
            method = str(settings.get("quant_method") or settings.get("quant_algo") or "")
            if not method and any(settings.get(name) for name in ("load_in_4bit", "load_in_8bit")):
                method = "bitsandbytes"
        name = _METHODS.get(method.lower().replace("_", "-"), _METHODS.get(method.lower(), method or "unknown"))
        raise UserError(f"{file} declares quantised weights ({key}: {name}). {_REMEDY}")


def refuse_quantised_tensors(folder: Path, tensors: Iterable[tuple[str, str]]) -> None:
    """Raise UserError where names or dtypes (safetensors' names of them) show that weights are quantised."""
    tensors = list(tensors)
    for ending, method in _ENDINGS.items():
        for name, _ in tensors:
            if name.endswith(ending):
                raise UserError(f"{folder} holds quantised weights ({method}: tensor {name}). {_REMEDY}")
    for name, dtype in tensors:
        if dtype not in _FLOATS:
            kind = "FP8" if dtype.startswith("F8") else dtype
            raise UserError(f"{folder} holds quantised weights ({kind}: tensor {name} is of {dtype}). {_REMEDY}")
