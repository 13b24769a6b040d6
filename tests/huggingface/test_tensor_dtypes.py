"""Files that mix dtypes come back bit for bit, and a model that rounds them says so."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import run_distributed
from support.tiny_models import load_transformers, write_model

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.tensor_dtypes import widest_by_kind
from megatron_tropd.models import convert
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.parallel.groups import initialize

FP32 = ("norm.weight", "layernorm.weight", "mlp.gate.weight", "block_sparse_moe.gate.weight", "lm_head.weight")


def mix(name):
    """The dtype of a tensor: norms, routers and the output layer fp32, odd ones in single layers."""
    if name.endswith(FP32):
        return torch.float32
    if name in ("model.layers.2.self_attn.v_proj.weight", "model.layers.1.self_attn.q_proj.bias"):
        return torch.float16
    return torch.float32 if name == "model.layers.3.self_attn.o_proj.weight" else torch.bfloat16


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Models of bf16 numbers beside fp32 ones that bf16 does not have."""
    root = tmp_path_factory.mktemp("hf")
    for kind in ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"):
        write_model(root / kind, kind, torch.float32)
        tensors = {name: tensor.to(mix(name)) for name, tensor in load_file(root / kind / "model.safetensors").items()}
        save_file(tensors, root / kind / "model.safetensors", metadata={"format": "pt"})
    return root


def _tensors(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _round_trip(sources, root, there, back):
    initialize(ModelConfig())
    for source in sources:
        name = source.rsplit("/", 1)[1]
        convert.convert_hf_to_mcore(source, f"{root}/{name}", verify=True, **there)
        convert.convert_mcore_to_hf(f"{root}/{name}", f"{root}/{name}_hf", **back)


@pytest.mark.parametrize(
    ("world_size", "there", "back", "kinds"),
    [
        (1, {}, {}, ("llama", "qwen2", "qwen3", "mixtral", "qwen3_moe")),
        (2, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, ("llama", "qwen2", "qwen3_moe")),
        (2, {"expert_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}, ("mixtral",)),
    ],
)
def test_field_cases_a16_mixed_dtypes_come_back_bit_for_bit(hf, tmp_path, world_size, there, back, kinds):
    sources = [str(hf / kind) for kind in kinds]
    run_distributed(_round_trip, world_size, sources, str(tmp_path), there, back)
    for kind in kinds:
        theirs, ours = (_tensors(p) for p in (hf / kind, tmp_path / f"{kind}_hf"))
        assert theirs.keys() == ours.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype == mix(name), name
            assert torch.equal(ours[name], tensor), name
        assert json.loads((tmp_path / f"{kind}_hf" / "config.json").read_text())["dtype"] == "bfloat16"
        tokens = torch.arange(20)[None]
        logits = [load_transformers(p, torch.float32)(tokens).logits for p in (hf / kind, tmp_path / f"{kind}_hf")]
        assert torch.equal(*logits)


def _matrices_stay_small(source, folder):
    from megatron_tropd.models.sharded_checks import stored_tensors

    initialize(ModelConfig())
    convert.convert_hf_to_mcore(source, folder)
    return {key: str(tensor.dtype) for key, tensor in stored_tensors(folder).items()}


def test_field_cases_a16_matrices_stay_in_their_dtype(hf, tmp_path):
    (stored,) = run_distributed(_matrices_stay_small, 1, str(hf / "qwen3"), str(tmp_path / "c"))
    assert stored["decoder.layers.mlp.linear_fc1.weight"] == stored["decoder.layers.mlp.linear_fc2.weight"]
    assert stored["decoder.layers.mlp.linear_fc1.weight"] == "torch.bfloat16"
    assert stored["decoder.final_layernorm.weight"] == "torch.float32"
    assert stored["decoder.layers.self_attention.linear_proj.weight"] == "torch.float32"  # of one layer


def _load(folder, checkpoint, dtype):
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger("megatron_tropd").addHandler(handler)
    model = ModelConfig(hf_path=folder, dtype=dtype)
    groups = initialize(model)
    if checkpoint:
        convert.convert_hf_to_mcore(folder, checkpoint)
        model.checkpoint = checkpoint
    chunks = build_model(load_hf_config(folder), model, groups, training=False)
    try:
        convert.load_model_weights(chunks, model, groups)
    except UserError as error:
        return str(error)
    norm = chunks[0].decoder.final_layernorm.weight
    return {str(p.dtype) for p in chunks[0].parameters()}, norm.detach().float(), records


@pytest.mark.parametrize("with_checkpoint", [False, True])
def test_field_cases_a16_a_model_that_runs_rounds_as_transformers_and_says_so(hf, tmp_path, with_checkpoint):
    checkpoint = str(tmp_path / "c") if with_checkpoint else None
    ((dtypes, norm, records),) = run_distributed(_load, 1, str(hf / "llama"), checkpoint, "bfloat16")
    assert dtypes == {"torch.bfloat16"}
    theirs = load_transformers(hf / "llama", torch.bfloat16).model.norm.weight
    assert torch.equal(norm, theirs.detach().float())
    lines = [record for record in records if "rounded" in record]
    assert any("parameters of float32 beside bfloat16 are rounded to bfloat16" in line for line in lines)
    if not with_checkpoint:
        assert any("1 parameters of float16 beside bfloat16 are rounded to bfloat16" in line for line in lines)
    ((dtypes, norm, records),) = run_distributed(_load, 1, str(hf / "llama"), None, "float32")
    assert torch.equal(norm, load_file(hf / "llama" / "model.safetensors")["model.norm.weight"])
    assert not records


def test_numbers_that_float16_does_not_have_are_refused(hf, tmp_path):
    tensors = load_file(hf / "llama" / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    folder = tmp_path / "large"
    write_model(folder, "llama")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (message,) = run_distributed(_load, 1, str(folder), None, "float16")
    assert "model.norm.weight holds numbers up to 1e+06, and float16 ends at 65504" in message


def _export_large_numbers(source, root):
    convert.convert_hf_to_mcore(source, f"{root}/c")
    messages = []
    for dtype in ("float16", "float32"):
        try:
            convert.convert_mcore_to_hf(f"{root}/c", f"{root}/{dtype}", dtype=dtype)
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    return messages


def test_field_cases_a16_numbers_that_float16_does_not_have_are_not_exported(hf, tmp_path):
    tensors = load_file(hf / "llama" / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = 1e5
    shutil.copytree(hf / "llama", tmp_path / "large")
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    ((message, other),) = run_distributed(_export_large_numbers, 1, str(tmp_path / "large"), str(tmp_path))
    assert "in float16: decoder.layers.2.mlp.linear_fc2.weight on rank 0" in message
    assert "65504" in message
    assert not (tmp_path / "float16").exists()
    assert other is None


def test_the_widest_dtype_of_a_kind_holds_all_its_layers():
    b, h, f = torch.bfloat16, torch.float16, torch.float32
    kinds = widest_by_kind({"layers.0.a": b, "layers.1.a": h, "layers.0.e.3.w": b, "layers.12.e.0.w": b, "n": f})
    assert kinds == {"layers.*.a": f, "layers.*.e.*.w": b, "n": f}
