"""Verification passes rounding and refuses a part that is missing, and tells which is which."""

import contextlib
import copy
import io
import types

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import load_transformers, write_model

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface import config as hf_config
from megatron_tropd.huggingface.config import load_hf_config
from megatron_tropd.models import convert, hf_weights, reference, verify
from megatron_tropd.models.verdict import Verdict
from megatron_tropd.models.verdict import judge as judge_parts
from megatron_tropd.parallel.groups import initialize

# SmolLM2-135M with narrower heads: 9 heads in 3 groups, 30 layers, tied.
SMOL = {
    **{"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144, "intermediate_size": 384},
    **{"num_hidden_layers": 30, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "initializer_range": 0.04},
}
WINDOW = {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 0, "max_position_embeddings": 600}
TP, PP, EP, CP = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "expert_model", "context"))


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    write_model(root / "smol", "llama_tied", torch.bfloat16, **SMOL)
    write_model(root / "window", "qwen2", **WINDOW)
    for kind in ("llama", "llama3_rope", "qwen3", "mixtral", "qwen3_moe"):
        write_model(root / kind, kind, torch.bfloat16, max_position_embeddings=600)
    return root


def _verify(folder, layout, options):
    model = ModelConfig(hf_path=folder, dtype="bfloat16", **layout)
    try:
        verdict = verify.verify_model(folder, model, initialize(model), **options)
    except UserError as error:
        return str(error)
    return str(verdict), verdict.layers, verdict.difference, verdict.own, len(verdict.parts[0].difference)


def test_field_cases_b11_rounding_passes_under_tp_3(hf):
    first, *others = run_distributed(_verify, 3, str(hf / "smol"), {TP: 3}, {"at_least": 30})
    assert all(other == first for other in others)
    text, layers, difference, own, length = first
    assert (len(layers), length) == (30, 512)
    assert "verified 30 of 30 layers + embedding and output on 512 tokens against transformers" in text
    assert 0 < difference < 5e-6
    assert 0 < own < 5e-6


@pytest.mark.parametrize(
    ("kind", "world_size", "layout", "layers"),
    [
        ("smol", 2, {PP: 2, "virtual_pipeline_model_parallel_size": 5}, (0, 29)),
        ("smol", 3, {PP: 3}, (0, 1, 29)),
        ("smol", 2, {PP: 2, "num_layers_in_first_pipeline_stage": 7}, (0, 29)),
        ("llama", 4, {CP: 2, TP: 2, "sequence_parallel": True}, (0, 3)),
        ("llama", 4, {CP: 2, PP: 2}, (0, 3)),
        ("mixtral", 2, {EP: 2}, (0, 3)),
        ("qwen3_moe", 2, {EP: 2, PP: 1, "expert_tensor_parallel_size": 1}, (0, 1, 3)),  # layer 1 is the dense one
        ("qwen3_moe", 4, {PP: 2, TP: 2}, (0, 1, 2, 3)),
        ("qwen3", 2, {}, (0, 3)),  # two replicas
    ],
)
def test_a_few_layers_are_verified_in_the_layout_that_trains(hf, kind, world_size, layout, layers):
    first, *others = run_distributed(_verify, world_size, str(hf / kind), layout, {})
    assert all(other == first for other in others)
    assert isinstance(first, tuple), first
    assert first[1] == layers
    assert first[2] < 5e-6


def _without(folders, cases):
    """Verify with Megatron's model lacking something of the folder's; the messages."""
    messages = []
    build, load = verify.build_model, verify.load_hf_weights
    hf_config._refuse_unsupported = lambda *arguments: None  # as if a window were not known
    for folder, fields, overrides, edit in cases:

        def other(few, *arguments, fields=fields, overrides=overrides, **options):
            few = copy.deepcopy(few)
            for key, value in fields.items():
                setattr(few, key, value)
            return build(few, *arguments, **{**options, **overrides})

        def other_weights(chunks, *arguments, edit=edit):
            load(chunks, *arguments)
            for name, parameter in chunks[0].named_parameters():
                if edit and edit in name:
                    parameter.data.zero_()

        verify.build_model, verify.load_hf_weights = other, other_weights
        messages.append(_verify(folders[folder], {}, {}))
    return messages


def _rope(folder, **fields):
    config = load_hf_config(folder)
    rope = {**hf_config.rope_parameters(config), **fields}
    if hasattr(config, "rope_parameters"):
        return {"rope_parameters": rope}
    theta = rope.pop("rope_theta")  # transformers 4
    return {"rope_theta": theta, "rope_scaling": rope if rope["rope_type"] != "default" else None}


def test_field_cases_b11_a_missing_part_is_refused_and_named(hf):
    folders = {path.name: str(path) for path in hf.iterdir()}
    theta, scaling = _rope(folders["llama"], rope_theta=20000.0), _rope(folders["llama3_rope"], factor=7.0)
    cases = {
        "window": ("window", {}, {}, None),
        "theta": ("llama", theta, {}, None),
        "scaling": ("llama3_rope", scaling, {}, None),
        "larger eps": ("smol", {}, {"layernorm_epsilon": 1e-4}, None),
        "smaller eps": ("smol", {}, {"layernorm_epsilon": 1e-6}, None),
        "eps of MoE": ("qwen3_moe", {}, {"layernorm_epsilon": 1e-5}, None),
        "bias": ("window", {}, {}, "linear_qkv.bias"),
        "scale": ("llama", {}, {"softmax_scale": 0.3}, None),
        "more experts": ("mixtral", {}, {"moe_router_topk": 3}, None),
        "softmax first": ("mixtral", {}, {"moe_router_pre_softmax": True}, None),
        "activation": ("llama", {}, {"activation_func": torch.nn.functional.gelu}, None),
        "embedding": ("llama", {}, {}, "word_embeddings"),
        "final norm": ("llama", {}, {}, "final_layernorm"),
        "q norm": ("qwen3", {}, {}, "q_layernorm"),
    }
    (messages,) = run_distributed(_without, 1, folders, list(cases.values()))
    for name, message in zip(cases, messages, strict=True):
        assert isinstance(message, str), (name, message)
        assert "more than the bound of 2e-05" in message, name
        assert "That is no rounding" in message, (name, message)
        assert "transformers' own rounding there, sdpa to eager" in message
    found = dict(zip(cases, messages, strict=True))
    assert "the first 100. That is no rounding: it begins at position 100: an attention window" in found["window"]
    for name in ("theta", "scaling", "scale"):
        assert "it begins with the second token: the rotary embedding" in found[name], found[name]
    for name in ("larger eps", "smaller eps", "activation", "more experts", "eps of MoE"):
        assert "layer 0 differs" in found[name]
        assert "another norm or its epsilon" in found[name]
    assert "the embedding differs" in found["embedding"]
    assert "the output layer differs" in found["final norm"]


def _convert_swapping_layers(folder, root):
    """Convert with a mapping that takes layer 1 for layer 2 and the reverse; the messages."""
    initialize(ModelConfig())
    rule_of = hf_weights.rule_of
    hf_weights.rule_of = lambda name, layers, *rest: rule_of(name, [{1: 2, 2: 1}.get(i, i) for i in layers], *rest)
    messages = []
    for verify_what in (True, "all"):
        try:
            convert.convert_hf_to_mcore(folder, f"{root}/{verify_what}", verify=verify_what, **{PP: 2})
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_field_cases_b11_all_layers_of_a_checkpoint_are_compared_by_transformers_names(hf, tmp_path):
    for bits, everything in run_distributed(_convert_swapping_layers, 2, str(hf / "llama"), str(tmp_path)):
        assert bits is None  # the same mapping reads the files back: why the whole model can be compared
        assert "layer 1 differs from transformers'" in everything
        assert "Nothing was written" in everything
    assert [path.name for path in tmp_path.iterdir()] == ["True"]


def _what_conversion_prints(folder, output):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        convert.convert_hf_to_mcore(folder, output, verify="all")
    return printed.getvalue()


@pytest.mark.parametrize("kind", ["smol", "qwen3_moe"])
def test_all_layers_of_a_checkpoint_are_verified(hf, tmp_path, kind):
    (printed,) = run_distributed(_what_conversion_prints, 1, str(hf / kind), str(tmp_path / "c"))
    count = load_hf_config(hf / kind).num_hidden_layers
    assert f"of the checkpoint, verified {count} of {count} layers + embedding and output" in printed


def test_the_bound_decides(hf):
    arguments = str(hf / "smol"), {TP: 3}
    for message in run_distributed(_verify, 3, *arguments, {"bound": 0.0, "at_least": 4}):
        assert "more than the bound of 0 " in message
        assert "So little may be rounding" in message
    for verdict in run_distributed(_verify, 3, *arguments, {"bound": 1e-4, "at_least": 4}):
        assert isinstance(verdict, tuple)


def _part(excess, own, sparse=False, name="layer 7"):
    vectors = (torch.tensor(values, dtype=torch.float64) for values in (excess, excess, own))
    return reference.Part(name, 7, *vectors, sparse=sparse)


def test_rounding_as_large_as_transformers_own_passes_and_routers_may_flip():
    def judge(part):
        return judge_parts(Verdict([part], (7,), 8), 1e-5)

    assert judge(_part([5e-5], [1e-5])) is None
    assert judge(_part([2e-4], [1e-5])) is None
    assert "may be rounding" in judge(_part([5e-4], [1e-5]))
    assert "no rounding" in judge(_part([5e-2], [1.0]))  # whatever transformers' two attentions do
    assert "NaN" in judge(_part([float("nan")], [0.0]))
    flips = [0.0] * 198 + [0.5] * 2
    assert judge(_part(flips, [1e-7], sparse=True)) is None
    assert "at 2 of 200 positions" in judge(_part(flips, [1e-7]))
    assert "at 3 of 200 positions" in judge(_part([*flips[1:], 0.5], [1e-7], sparse=True))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe"])
def test_the_reference_is_transformers_own_model(hf, kind):
    """Fed with transformers' own hidden states, every part agrees to the last bit with what it computes itself."""
    folder = hf / kind
    config = load_hf_config(folder)
    model = load_transformers(folder, torch.float32)
    if hasattr(model, "set_experts_implementation") and kind != "llama":
        model.set_experts_implementation("eager")
    model.config._attn_implementation = "eager"
    tokens = verify.sample_tokens(config)
    seen = {}
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda m, a, out, i=i: seen.update({str(i): (out[0] if isinstance(out, tuple) else out)[0]})
        )
    with torch.no_grad():
        seen["embedding"] = model.model.embed_tokens(tokens)
        seen["logits"] = model(tokens[None], use_cache=False).logits[0][:: reference.LOGITS_EVERY]
    parts = reference.compare_parts(folder, config, (0, 1, 2, 3), tokens, seen, torch.device("cpu"))
    assert [part.difference.max().item() for part in parts] == [0.0] * 6
    assert all(0 < part.own.max() < 1e-5 for part in parts[1:-1])
    assert [part.sparse for part in parts[1:-1]] == {
        "llama": [False] * 4,
        "mixtral": [True] * 4,
        "qwen3_moe": [True, False, True, True],
    }[kind]


def test_the_tokens_look_like_text_and_reach_beyond_a_window():
    config = types.SimpleNamespace(vocab_size=32000, max_position_embeddings=131072)
    tokens = verify.sample_tokens(config)
    assert len(tokens) == 512
    assert tokens.min() >= 0
    assert tokens.max() >= 31000
    assert tokens.max() < 32000
    assert (tokens < 320).float().mean() > 0.4  # a hundredth of the vocabulary is half of a text
    assert (tokens[1:] == tokens[:-1]).any()
    config.sliding_window = 2048
    assert len(verify.sample_tokens(config)) == 2048 + 64
    config.max_position_embeddings = 256
    assert len(verify.sample_tokens(config)) == 256


def test_layers_are_chosen_of_both_ends_and_of_each_kind():
    config = types.SimpleNamespace(num_hidden_layers=80, model_type="llama")
    assert verify.choose_layers(config, 2, 1) == (0, 79)
    assert verify.choose_layers(config, 4, 1) == (0, 1, 78, 79)
    assert len(verify.choose_layers(config, 2, 8)) == 8
    config.num_hidden_layers = 1
    assert verify.choose_layers(config, 2, 1) == (0,)
    config.num_hidden_layers = 7
    assert len(verify.choose_layers(config, 100, 2)) == 6


def test_a_model_of_70_billion_takes_little_of_the_host():
    sizes = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}
    fields = {"num_hidden_layers": 80, "vocab_size": 128256, "tie_word_embeddings": False, "head_dim": 128}
    config = types.SimpleNamespace(model_type="llama", **sizes, **fields)
    assert verify.model_bytes(config) / 4e9 == pytest.approx(70.55, abs=0.01)
    few = verify.truncate(config, verify.choose_layers(config, 2, 1))
    assert verify.model_bytes(few) < 16e9
    assert verify.reference_bytes(few) < 12e9
