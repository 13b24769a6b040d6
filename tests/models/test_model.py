"""Megatron models built from Hugging Face configs compute what transformers computes, and refuse what they cannot."""

import json
from types import SimpleNamespace

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import KINDS, VOCAB_SIZE, make_model, write_model
from transformers import AutoConfig

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models.build import (
    build_model,
    head_dim,
    load_hf_config,
    padded_vocab_size,
    recompute_fields,
    transformer_config,
)
from megatron_tropd.models.hf_weights import load_hf_weights
from megatron_tropd.models.verify import full_logits
from megatron_tropd.parallel.groups import initialize

TP, PP, EP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert"))
EXPERTS = ["mixtral", "qwen3_moe", "softmax_first"]
TOKENS = torch.randint(VOCAB_SIZE, (3, 100), generator=torch.Generator().manual_seed(7))
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
VARIANTS = {
    **{kind: (kind, {}) for kind in KINDS},
    "linear_rope": ("llama", {"rope_parameters": LINEAR, "rope_scaling": LINEAR}),
    "multi_head": ("llama", {"num_key_value_heads": 4}),
    "multi_query": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "wide_heads": ("llama", {"head_dim": 24, "rms_norm_eps": 1e-3}),
    "softmax_first": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": [], "decoder_sparse_step": 2}),
}


def _logits(folders, layout):
    """The last stage's logits of every folder, and what the chunks look like."""
    results = []
    for folder in folders:
        model = ModelConfig(hf_path=folder, dtype="float32", **layout)
        groups = initialize(model)
        hf_config = load_hf_config(folder)
        chunks = build_model(hf_config, model, groups, training=False)
        load_hf_weights(chunks, hf_config, folder, groups)
        assert all(not p.requires_grad for chunk in chunks for p in chunk.parameters())
        assert all(not chunk.training and chunk.true_vocab_size == VOCAB_SIZE for chunk in chunks)
        results.append((len(chunks), full_logits(chunks, TOKENS, groups, VOCAB_SIZE)))
    return results


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {name: write_model(root / name, kind, **options) for name, (kind, options) in VARIANTS.items()}


@pytest.fixture(scope="module")
def expected():
    with torch.no_grad():
        return {name: make_model(kind, **options)(TOKENS).logits for name, (kind, options) in VARIANTS.items()}


@pytest.fixture(scope="module")
def single(folders):
    (results,) = run_distributed(_logits, 1, list(folders.values()), {})
    return {name: logits for name, (_, logits) in zip(folders, results, strict=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(single, expected, name):
    assert (single[name] - expected[name]).abs().max() < 1e-4
    assert expected[name].std() > 0.1


def test_kinds_differ_where_they_should(expected):
    """A comparison is worth something only if ignoring the scaled rotation would show."""
    assert (expected["llama3_rope"] - expected["llama"]).abs().max() > 1e-2
    assert (expected["linear_rope"] - expected["llama"]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("world_size", "layout", "names"),
    [
        (2, {TP: 2, "sequence_parallel": True}, ["llama", "llama_tied", "qwen2", "qwen3", *EXPERTS]),
        (2, {PP: 2, "virtual_pipeline_model_parallel_size": 2}, ["llama3_rope", "llama_tied", "qwen3_moe"]),
        (2, {TP: 2, EP: 2, "expert_tensor_parallel_size": 1}, EXPERTS),
        (4, {EP: 4}, EXPERTS),
        (4, {TP: 2, EP: 2, "sequence_parallel": True}, EXPERTS),
        (4, {PP: 2, EP: 2}, EXPERTS),
    ],
    ids=["sequence_parallel", "interleaved", "experts_for_tensors", "ep4", "tp2_ep2", "pp2_ep2"],
)
def test_logits_do_not_depend_on_the_layout(folders, expected, world_size, layout, names):
    ranks = run_distributed(_logits, world_size, [folders[n] for n in names], layout)
    virtual = layout.get("virtual_pipeline_model_parallel_size", 1)
    assert all(count == virtual for rank in ranks for count, _ in rank)
    for i, name in enumerate(names):
        logits = [rank[i][1] for rank in ranks if rank[i][1] is not None]
        assert len(logits) == world_size // layout.get(PP, 1)
        for one in logits:
            assert (one - expected[name]).abs().max() < 1e-4, name


def test_the_vocabulary_is_padded_once_for_the_common_layouts():
    for vocab_size, padded in (
        (131, 256),
        (128, 128),
        (1, 128),
        (151_936, 151_936),
        (32_000, 32_000),
        (32_001, 32_128),
    ):
        assert {padded_vocab_size(vocab_size, tp) for tp in (1, 2, 4, 8, 16)} == {padded}
    assert padded_vocab_size(131, 3) == 384
    assert padded_vocab_size(32_000, 6) % 6 == 0


def test_head_width_comes_from_the_config_or_the_division():
    sizes = {"hidden_size": 32, "num_attention_heads": 4}
    assert head_dim(SimpleNamespace(**sizes)) == head_dim(SimpleNamespace(**sizes, head_dim=None)) == 8
    assert head_dim(SimpleNamespace(**sizes, head_dim=24)) == 24


def test_the_translated_config_carries_layout_and_architecture(folders):
    model = ModelConfig(tensor_model_parallel_size=2, sequence_parallel=True, recompute="full")
    config = transformer_config(load_hf_config(folders["qwen3"]), model, layernorm_epsilon=0.5)
    assert (config.num_layers, config.num_query_groups, config.kv_channels) == (4, 2, 16)
    assert config.qk_layernorm
    assert not config.add_qkv_bias
    assert (config.params_dtype, config.bf16, config.sequence_parallel) == (torch.bfloat16, True, True)
    assert (config.recompute_granularity, config.recompute_num_layers) == ("full", 1)
    assert config.layernorm_epsilon == 0.5
    assert transformer_config(load_hf_config(folders["qwen2"]), ModelConfig()).add_qkv_bias


def recompute_rank(folder):
    """Gradients with and without recomputed MLPs; forward passes of an MLP and checkpoints, in training and outside."""
    from megatron.core import tensor_parallel

    original, checkpoints = tensor_parallel.checkpoint, []
    tensor_parallel.checkpoint = lambda *arguments: checkpoints.append(1) or original(*arguments)
    model = ModelConfig(hf_path=folder, dtype="float32")
    groups, hf_config = initialize(model), load_hf_config(folder)
    positions, found = torch.arange(TOKENS.size(1)).expand_as(TOKENS), []
    for fields in ({}, recompute_fields("selective", fused=True)):
        (chunk,) = build_model(hf_config, model, groups, **fields)
        load_hf_weights([chunk], hf_config, folder, groups)
        passes, counts = [], []
        chunk.decoder.layers[1].mlp.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        for training in (True, False, True):
            passes.clear()
            checkpoints.clear()
            chunk.train(training)
            with torch.set_grad_enabled(training):
                output = chunk(TOKENS, positions, None)
            if training:
                chunk.zero_grad()
                output.square().mean().backward()
            counts.append((len(passes), len(checkpoints)))
        found.append((counts, [p.grad for p in chunk.parameters()]))
    return found


@pytest.mark.parametrize("kind", ["qwen2", "qwen3_moe"])
def test_mlps_and_experts_are_recomputed_in_training_only(kind, folders):
    ((kept, expected), (counts, gradients)) = run_distributed(recompute_rank, 1, folders[kind])[0]
    assert kept == [(1, 0)] * 3
    assert counts == [(2, 4), (1, 0), (2, 4)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(expected, gradients, strict=True))


def test_what_is_recomputed_is_what_stores_most():
    assert recompute_fields("selective", fused=True)["recompute_modules"] == ["mlp", "moe"]
    assert recompute_fields("selective", fused=False)["recompute_modules"] == ["core_attn"]
    assert recompute_fields(None, fused=True) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported for model_type llama"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"model_type": "mistral"}, "'mistral' is not supported; expected one of llama, qwen2, qwen3, qwen3_moe"),
        ({"model_type": None}, "None is not supported"),
        ({"rope": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic' is not supported"),
    ],
)
def test_a_config_with_an_unknown_part_is_refused(folders, tmp_path, change, message):
    config = AutoConfig.from_pretrained(folders["llama"]).to_dict()
    if "rope" in change:
        config["rope_parameters"] = {"rope_theta": 10000.0, **change.pop("rope")}
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_hf_config(tmp_path)


def test_sliding_windows_are_refused(folders, tmp_path):
    config = AutoConfig.from_pretrained(folders["qwen2"]).to_dict()
    windowed = {**config, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in windowed.items() if k != "layer_types"}))
    with pytest.raises(UserError, match="use_sliding_window=True"):
        load_hf_config(tmp_path)


def test_old_style_rope_keys_are_read(folders, tmp_path):
    """Configs written before transformers 5 have rope_theta and rope_scaling at the top."""
    config = AutoConfig.from_pretrained(folders["llama3_rope"]).to_dict()
    rope = config.pop("rope_parameters", None) or config.pop("rope_scaling")
    theta = rope.pop("rope_theta", None) or config["rope_theta"]  # the second under transformers 4
    old = {**config, "rope_theta": theta, "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(old))
    ours, theirs = load_hf_config(tmp_path), load_hf_config(folders["llama3_rope"])
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies = [ROPE_INIT_FUNCTIONS["llama3"](c, torch.device("cpu"))[0] for c in (ours, theirs)]
    assert torch.equal(*frequencies)


@pytest.mark.parametrize("content", ["", "{"], ids=["empty", "cut short"])
def test_a_broken_config_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        load_hf_config(tmp_path)
