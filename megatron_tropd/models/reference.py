"""Runs transformers' own layers on given inputs in fp32, with weights from the files and one layer in memory at a time.

The layers come from transformers' classes and run in transformers' own forward pass; each gets the hidden states
that Megatron's layer got, so each comparison is independent and rounding does not accumulate. Every layer runs twice,
with eager attention and with torch's (sdpa): the difference is transformers' own rounding.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.huggingface.files import SafetensorsFolder
from megatron_tropd.huggingface.mapping import expert_names, router_name

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)$")
LOGITS_EVERY = 8  # logits are compared at every eighth position
_ROWS = 64  # positions whose logits are compared at a time
_SUM_ROUNDING = 4 * 2.0**-24  # of a layer's two additions to the residual stream, on both sides


@dataclass(frozen=True)
class Part:
    """One comparison: the embedding, a layer or the output. All vectors have one entry per position."""

    name: str
    layer: int | None  # in the whole model, from 0
    difference: torch.Tensor  # [s] Megatron against transformers' eager, relative to what the part adds
    excess: torch.Tensor  # [s] the same without what adding to large hidden states must round
    own: torch.Tensor  # [s] sdpa against eager, relative likewise
    sparse: bool = False  # an MoE layer: rounding may route a token to other experts


def compare_parts(
    hf_path: str | Path,
    hf_config: Any,
    layers: tuple[int, ...],
    tokens: torch.Tensor,
    ours: dict[str, torch.Tensor],
    device: torch.device,
) -> list[Part]:
    """Compare the parts of a model with transformers'.

    Args:
        hf_path: folder of the whole model.
        hf_config: of a model of the chosen layers alone.
        layers: their numbers in the folder, from 0.
        tokens: [s].
        ours: Megatron's "embedding" [s, h], hidden states after layer "0", "1", ... of the chosen ones [s, h], and
            "logits" [s / LOGITS_EVERY, v].
        device: where transformers' layers compute.

    Returns:
        Embedding, layers and output, in this order.
    """
    with SafetensorsFolder(hf_path) as raw, SafetensorsFolder(hf_path, hf_config.model_type) as single, torch.no_grad():
        weights = _Weights(raw, single, hf_config, layers)
        model = _build(hf_config, device)
        rows = weights.embedding()[tokens.cpu()]
        parts = [_part("the embedding", None, ours["embedding"], rows, rows, torch.zeros_like(rows))]
        handles = []
        for place, layer in enumerate(model.model.layers):
            before = ours["embedding"] if place == 0 else ours[str(place - 1)]
            name = (f"layer {layers[place]}", layers[place], f"model.layers.{place}.")
            watcher = _LayerWatcher(name, before, ours[str(place)], weights, parts, model.config, device)
            handles.append(layer.register_forward_pre_hook(watcher.load, with_kwargs=True))
            handles.append(layer.register_forward_hook(watcher.compare, with_kwargs=True))
        last = ours[str(len(layers) - 1)].to(device)[None]
        handles.append(model.model.norm.register_forward_pre_hook(lambda module, args: (last,)))
        handles.append(model.lm_head.register_forward_pre_hook(lambda module, args: (args[0][:, ::LOGITS_EVERY],)))
        weights.fill(model.model.norm, "model.norm.", device)
        weights.fill(model.lm_head, "lm_head.", device)
        logits = model(inputs_embeds=ours["embedding"].to(device)[None], use_cache=False).logits[0]
        zero = torch.zeros(1)
        parts.append(_part("the output layer", None, ours["logits"], logits, logits, zero, is_sum=False))
        for handle in handles:
            handle.remove()
    return parts


def _build(hf_config: Any, device: torch.device) -> Any:
    """Return transformers' model without memory for its weights; the rotary embedding is real."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(hf_config)
    for name in ("dtype", "torch_dtype"):
        if hasattr(config, name):
            setattr(config, name, torch.float32)
            break
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation") and _has_experts(config):
        model.set_experts_implementation("eager")
    model = model.float().eval().requires_grad_(False)
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    return model


def _has_experts(config: Any) -> bool:
    return expert_names(config.model_type) is not None


class _Weights:
    """Fills transformers' modules from the files, whichever version named and fused the tensors."""

    def __init__(self, raw: SafetensorsFolder, single: SafetensorsFolder, hf_config: Any, layers: tuple[int, ...]):
        self._raw, self._single, self._config, self._layers = raw, single, hf_config, layers
        self._raw_names = raw.names()
        self._names = single.names()

    def embedding(self) -> torch.Tensor:
        return self._single.read("model.embed_tokens.weight").float()

    def fill(self, module: torch.nn.Module, prefix: str, device: torch.device) -> None:
        """Give a module memory and the weights of the files."""
        module.to_empty(device=device)
        for name, parameter in module.named_parameters():
            parameter.copy_(self._read(prefix + name))

    def _read(self, name: str) -> torch.Tensor:
        match = _LAYER.match(name)
        if match:
            name = f"model.layers.{self._layers[int(match[1])]}.{match[2]}"
        elif name == "lm_head.weight" and self._config.tie_word_embeddings:
            name = "model.embed_tokens.weight"
        if name in self._raw_names:
            return self._raw.read(name)
        if name in self._names:
            return self._single.read(name)
        head, _, kind = name.rpartition("mlp.")
        names = expert_names(self._config.model_type)
        assert names is not None  # dense models have none but the names above
        gate, up, down = (head + source for source in names)
        if kind == "gate.weight":
            return self._single.read(head + router_name(self._config.model_type))
        experts = range(self._count(down))
        if kind == "experts.down_proj":
            return torch.stack([self._single.read(down.format(e=e)) for e in experts])
        if kind == "experts.gate_up_proj":
            pairs = ((gate.format(e=e), up.format(e=e)) for e in experts)
            return torch.stack([torch.cat([self._single.read(a), self._single.read(b)]) for a, b in pairs])
        raise KeyError(f"no tensor of the files for transformers' parameter {name}")

    def _count(self, source: str) -> int:
        count = 0
        while source.format(e=count) in self._names:
            count += 1
        return count


class _LayerWatcher:
    """Hooks of one layer: weights come before its forward pass and go after it, and the result is compared."""

    def __init__(
        self,
        name: tuple[str, int, str],
        before: torch.Tensor,
        after: torch.Tensor,
        weights: _Weights,
        parts: list[Part],
        config: Any,
        device: torch.device,
    ):
        self._title, self._number, self._prefix = name
        self._before, self._after = before.to(device)[None], after
        self._weights, self._parts, self._config, self._device = weights, parts, config, device

    def load(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._weights.fill(module, self._prefix, self._device)
        return (self._before, *args[1:]), kwargs

    def compare(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        eager = _first(output)[0]
        self._config._attn_implementation = "sdpa"
        second = _first(module.forward(*args, **kwargs))[0]
        self._config._attn_implementation = "eager"
        sparse = any(".experts." in name or name.startswith("experts.") for name, _ in module.named_parameters())
        before = args[0][0]
        self._parts.append(_part(self._title, self._number, self._after, eager, second, before, sparse))
        module.to_empty(device=torch.device("meta"))


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # transformers 4 returns tuples


def _part(
    name: str,
    layer: int | None,
    ours: torch.Tensor,
    eager: torch.Tensor,
    second: torch.Tensor,
    before: torch.Tensor,
    sparse: bool = False,
    is_sum: bool = True,
) -> Part:
    """Measure distances [s] in the 2-norm over the last axis, relative to what the part adds to `before`."""
    found: list[list[torch.Tensor]] = [[], [], []]
    for start in range(0, len(eager), _ROWS):
        rows = slice(start, start + _ROWS)
        theirs = eager[rows].double()
        base = before[rows].to(eager.device).double() if before.dim() > 1 else before.to(eager.device)
        scale = _norm(theirs - base).clamp_min(1e-30)
        distance = _norm(ours[rows].to(eager.device).double() - theirs)
        rounding = _SUM_ROUNDING * _norm(theirs) if is_sum and before.dim() > 1 else 0.0
        found[0].append(distance / scale)
        found[1].append((distance - rounding).clamp_min(0) / scale)  # NaN stays NaN
        found[2].append(_norm(second[rows].double() - theirs) / scale)
    difference, excess, own = (torch.cat(values).cpu() for values in found)
    return Part(name, layer, difference, excess, own, sparse=sparse)


def _norm(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows, dim=-1)
