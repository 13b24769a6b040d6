"""config.json: what cannot be read or computed is refused in one line, and every field of the function is compared."""

import json
import shutil

import pytest
import torch
from support.tiny_models import write_model

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.compare import difference
from megatron_tropd.huggingface.config import load_hf_config, portable_config, rope_parameters
from megatron_tropd.models import convert

KINDS = ("llama", "llama3_rope", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for kind in KINDS:
        write_model(root / kind, kind)
        rope = rope_parameters(load_hf_config(root / kind))
        file = root / kind / "config.json"
        fields = json.loads(file.read_text())
        fields = {key: value for key, value in fields.items() if key not in ("rope_theta", "rope_scaling")}
        file.write_text(json.dumps({**fields, "rope_parameters": rope}))  # as transformers 5 writes it, under each
    return root


def config_of(source, folder, change):
    """Write a folder with only the config.json of another, changed; a field that becomes "absent" is left out."""
    folder.mkdir()
    fields = json.loads((source / "config.json").read_text())
    fields = {**fields, **(change(fields) if callable(change) else change)}
    text = json.dumps({key: value for key, value in fields.items() if value != "absent"})
    (folder / "config.json").write_text(text)
    return folder


def refusal(folder):
    with pytest.raises(UserError) as caught:
        load_hf_config(folder)
    assert "\n" not in str(caught.value)
    assert str(folder / "config.json") in str(caught.value)
    return str(caught.value)


def rope(**fields):
    """Set or change the rotary embedding under the names of transformers 5 and none else."""
    return lambda c: {
        "rope_parameters": {**(c.get("rope_parameters") or {}), **fields},
        "rope_scaling": "absent",
        "rope_theta": "absent",
    }


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        ("llama", rope(rope_theta=500000.0), "rope rope_theta"),
        ("llama", rope(rope_type="linear", factor=2.0), "rope "),
        ("llama3_rope", rope(factor=4.0), "rope factor"),
        ("llama3_rope", rope(low_freq_factor=2.0), "rope low_freq_factor"),
        ("llama3_rope", rope(original_max_position_embeddings=128), "rope original_max_position_embeddings"),
        ("llama", {"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ("llama", {"head_dim": 16}, "head_dim"),
        ("qwen3", {"tie_word_embeddings": False}, "tie_word_embeddings"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"num_experts_per_tok": 1}, "num_experts_per_tok"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe", {"mlp_only_layers": [2]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("qwen3_moe", {"moe_intermediate_size": 32}, "moe_intermediate_size"),
        ("llama", {"num_hidden_layers": 3}, "num_hidden_layers"),
        ("llama", {"a_field_of_tomorrow": 0.5}, "a_field_of_tomorrow"),
    ],
)
def test_field_cases_a13_every_field_of_the_function_is_compared(hf, tmp_path, monkeypatch, kind, change, key):
    other = config_of(hf / kind, tmp_path / "other", change)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    shutil.copytree(hf / kind, checkpoint / "hf")
    (checkpoint / "complete.json").write_text("{}")
    model = ModelConfig(checkpoint=str(checkpoint), hf_path=str(hf / kind))
    assert convert.resolve_hf_path(model, "student") == hf / kind
    with pytest.raises(UserError, match=r"student\.checkpoint=.* is of another model than student\.hf_path") as caught:
        convert.resolve_hf_path(ModelConfig(checkpoint=str(checkpoint), hf_path=str(other)), "student")
    assert f": {key}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"transformers_version": "4.40.0", "_name_or_path": "x", "architectures": ["Other"]}),
        ("llama", {"torch_dtype": "bfloat16", "dtype": "absent", "use_cache": False, "initializer_range": 0.1}),
        ("llama", {"eos_token_id": [2, 3], "bos_token_id": 5, "pad_token_id": None, "pretraining_tp": 8}),
        ("llama", {"max_position_embeddings": 4096, "attention_dropout": 0.1, "hidden_act": "swish"}),
        ("qwen2", {"sliding_window": 4096, "max_window_layers": 2, "use_sliding_window": False}),
        ("llama", lambda c: {"rope_parameters": "absent", "rope_theta": 10000, "rope_scaling": None}),
        ("llama", rope(type="default")),
        (
            "llama3_rope",
            lambda c: {
                "rope_parameters": "absent",
                "rope_theta": 500000,
                "rope_scaling": {k: v for k, v in c["rope_parameters"].items() if k != "rope_theta"},
            },
        ),
    ],
)
def test_field_cases_a13_what_changes_nothing_is_no_difference(hf, tmp_path, kind, change):
    other = load_hf_config(config_of(hf / kind, tmp_path / "other", change))
    assert difference(load_hf_config(hf / kind), other) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "cannot be read"),
        ('{"model_type": "llama"', "cannot be read"),
        ("[1, 2]", "holds list, no object"),
        ('"llama"', "holds str, no object"),
        ("{}", "model_type None is not supported"),
        ('{"model_type": 3}', "model_type 3 is not supported"),
        ('{"model_type": "llama"}', "lacks hidden_size"),
        ("\udce4", "cannot be read"),
    ],
)
def test_field_cases_b13_a_config_that_is_none(tmp_path, text, expected):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        *(("llama", {key: None}, f"{key}=None, expected a positive") for key in ("hidden_size", "vocab_size")),
        ("llama", {"num_hidden_layers": "4"}, "num_hidden_layers='4', expected a positive whole number"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads=0, expected"),
        ("llama", {"intermediate_size": 48.5}, "intermediate_size=48.5, expected"),
        ("llama", {"hidden_size": True}, "hidden_size=True, expected"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None}, "num_attention_heads"),
        ("llama", {"head_dim": 7}, "heads of 7 are not even"),
        ("llama", {"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("llama", {"hidden_act": 3}, "hidden_act"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters=[1], expected an object"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling='linear', expected an object"),
        ("llama", rope(rope_theta="10000"), "rope_theta"),
        ("llama", rope(rope_theta=-1.0), "rope_theta"),
        ("llama", rope(rope_type="linear"), "factor"),
        ("llama", rope(rope_type="linear", factor="2"), "factor"),
        ("llama3_rope", rope(factor=None), "factor"),
        ("llama3_rope", rope(low_freq_factor=9.0), "low_freq_factor"),
        ("llama", rope(rope_type="yarn", factor=2.0), "'yarn' is not supported"),
        ("llama", rope(rope_type="nonsense"), "nonsense"),
        ("llama", {"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 8.0}}, "contradict"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5 is more than the 4 experts"),
        ("qwen3_moe", {"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob"),
    ],
)
def test_field_cases_b13_impossible_values_are_named(hf, tmp_path, kind, change, expected):
    assert expected in refusal(config_of(hf / kind, tmp_path / "c", change))


@pytest.mark.parametrize(
    ("kind", "change", "key"),
    [
        *(("llama", {key: 0.5}, key) for key in ("partial_rotary_factor", "attention_multiplier", "logits_scaling")),
        *(("llama", {key: 12}, key) for key in ("embedding_multiplier", "residual_multiplier", "scale_emb")),
        *(("llama", {key: 30.0}, key) for key in ("final_logit_softcapping", "attn_logit_softcapping", "clip_qkv")),
        ("llama", rope(partial_rotary_factor=0.5), "partial_rotary_factor"),
        ("llama", rope(mrope_section=[2, 1, 1]), "mrope_section"),
        ("llama", {"use_qk_norm": True}, "use_qk_norm"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved"),
        ("qwen2", {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, "use_sliding_window"),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"], "sliding_window": 8}, "layer_types"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}, "layer_types"),
        ("llama", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "use_sliding_window"),
        ("mixtral", {"sliding_window": 4096}, "sliding_window"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size"),
    ],
)
def test_field_cases_a13_fields_of_other_architectures_are_refused(hf, tmp_path, kind, change, key):
    message = refusal(config_of(hf / kind, tmp_path / "c", change))
    assert f"{key}=" in message
    assert "is not supported" in message


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4, "layer_types": "absent"}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 36, "layer_types": "absent"}),
        ("llama", {"_attn_implementation": "flash_attention_2", "_flash_attn_2_enabled": True}),
        ("llama", {"attn_implementation": "flash_attention_2", "gradient_checkpointing": True}),
        ("llama", {"rope_interleaved": False, "is_llama_config": True}),
    ],
)
def test_field_cases_a13_settings_that_leave_the_function_alone_are_no_reason_to_refuse(hf, tmp_path, kind, change):
    load_hf_config(config_of(hf / kind, tmp_path / "c", change))


def test_neutral_values_of_such_fields_are_fine(hf, tmp_path):
    neutral = {
        **{"partial_rotary_factor": 1.0, "logits_scaling": 1, "use_qk_norm": False, "pretraining_tp": 2},
        **{"final_logit_softcapping": None, "clip_qkv": None, "num_nextn_predict_layers": 0, "rope_scaling": None},
    }
    load_hf_config(config_of(hf / "llama", tmp_path / "c", neutral))


@pytest.mark.parametrize("kind", ["llama", "llama3_rope", "qwen2", "mixtral"])
def test_field_cases_b12_configs_of_transformers_4_and_5_say_the_same(hf, tmp_path, kind):
    ours = load_hf_config(hf / kind)
    rope = {**rope_parameters(ours), "rope_theta": 123456.0}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaling = None if rope["rope_type"] == "default" else scaling
    old = {"rope_theta": 123456.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    new = {"rope_parameters": rope, "dtype": "float32"}
    absent = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters", "dtype", "torch_dtype"), "absent")
    configs = [
        load_hf_config(config_of(hf / kind, tmp_path / name, {**absent, **fields}))
        for name, fields in (("old", old), ("new", new), ("both", {**old, **new}))
    ]
    for config in configs:
        assert rope_parameters(config) == rope_parameters(configs[0])
        assert rope_parameters(config)["rope_theta"] == 123456.0
        assert difference(config, configs[0]) is None
    raw = portable_config({**json.loads((hf / kind / "config.json").read_text()), **new})
    assert raw["rope_theta"] == 123456.0
    assert raw["torch_dtype"] == raw["dtype"] == "float32"


def test_the_rotation_is_that_of_transformers(hf):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from megatron_tropd.huggingface.config import inverse_frequencies

    config = load_hf_config(hf / "llama3_rope")
    assert torch.equal(inverse_frequencies(config), LlamaRotaryEmbedding(config=config).inv_freq)
