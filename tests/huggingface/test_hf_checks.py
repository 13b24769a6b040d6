"""Weights that are not those of their config.json are refused before anything is built, each with its remedy."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.helpers import run_distributed
from support.tiny_models import write_model

from megatron_tropd.config import ModelConfig, TeacherConfig
from megatron_tropd.errors import UserError
from megatron_tropd.models import convert
from megatron_tropd.parallel.groups import initialize

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
KINDS = ("llama", "llama_tied", "qwen2", "qwen3", "mixtral", "qwen3_moe")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    for kind in KINDS:
        write_model(root / kind, kind, torch.bfloat16)
    return root


def changed(source, folder, change=None, config=None):
    """Copy a folder; `change` edits its tensors, `config` fields of its config.json."""
    shutil.copytree(source, folder)
    if change:
        tensors = dict(load_file(folder / "model.safetensors"))
        change(tensors)
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config:
        file = folder / "config.json"
        fields = {**json.loads(file.read_text()), **config}
        file.write_text(json.dumps({key: value for key, value in fields.items() if value != "absent"}))
    return folder


def refusal(folder, tmp_path, **options):
    """The message with which a conversion is refused; nothing is left behind."""
    with pytest.raises(UserError) as caught:
        convert.convert_hf_to_mcore(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.tmp").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grow(ending, dim, by):
    """Return a change that makes all tensors of this ending larger or smaller along a dimension."""

    def change(tensors):
        for name, tensor in tensors.items():
            if name.endswith(ending):
                tensors[name] = (
                    torch.cat([tensor, tensor.narrow(dim, 0, by)], dim)
                    if by > 0
                    else tensor.narrow(dim, 0, tensor.size(dim) + by)
                )

    return change


def several(*changes):
    def change(tensors):
        for one in changes:
            one(tensors)

    return change


MLP = several(grow("gate_proj.weight", 0, 16), grow("up_proj.weight", 0, 16), grow("down_proj.weight", 1, 16))
SMALLER_MLP = several(*(grow(f"{p}_proj.weight", d, -16) for p, d in (("gate", 0), ("up", 0), ("down", 1))))
HEADS = several(*(grow(f"{p}_proj.weight", 0, n) for p, n in zip("qkv", (32, 16, 16), strict=True)))
WIDER_HEADS = several(HEADS, grow("o_proj.weight", 1, 32))
KV_HEADS = several(grow("k_proj.weight", 0, 16), grow("v_proj.weight", 0, 16))
LARGER_VOCABULARY = several(grow(EMBEDDING, 0, 13), grow(OUTPUT, 0, 13))
SMALLER_VOCABULARY = several(grow(EMBEDDING, 0, -3), grow(OUTPUT, 0, -3))
EXPERT_WIDTH = several(
    *(grow(f"experts.{e}.{p}_proj.weight", d, 8) for e in range(4) for p, d in (("gate", 0), ("up", 0), ("down", 1)))
)


def more_experts(tensors):
    for name in [n for n in tensors if ".experts.3." in n]:
        tensors[name.replace(".experts.3.", ".experts.4.")] = tensors[name].clone()
    grow("mlp.gate.weight", 0, 1)(tensors)


def more_layers(tensors):
    for name in [n for n in tensors if n.startswith("model.layers.3.")]:
        tensors[name.replace("layers.3.", "layers.4.")] = tensors[name].clone()


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("llama", LARGER_VOCABULARY, (f"{EMBEDDING} has shape (144, 32), expected (131, 32)", "set vocab_size=144")),
        ("llama", SMALLER_VOCABULARY, ("has shape (128, 32), expected (131, 32)", "set vocab_size=128")),
        ("llama_tied", grow(EMBEDDING, 0, 13), ("has shape (144, 32)", "set vocab_size=144")),
        ("llama", grow(OUTPUT, 0, 5), (f"{OUTPUT} has shape (136, 32), expected (131, 32)", "config.json is not")),
        ("llama", MLP, ("(64, 32), expected (48, 32)", "intermediate_size=48: set intermediate_size=64")),
        ("llama", SMALLER_MLP, ("(32, 32), expected (48, 32)", "set intermediate_size=32")),
        ("llama", WIDER_HEADS, ("q_proj.weight has shape (64, 32), expected (32, 32)", "set head_dim=16")),
        ("llama", KV_HEADS, ("k_proj.weight has shape (32, 32), expected (16, 32)", "set num_key_value_heads=4")),
        ("qwen3", grow("q_norm.weight", 0, 2), ("q_norm.weight has shape (18,), expected (16,)",)),
        ("qwen3_moe", EXPERT_WIDTH, ("(32, 32), expected (24, 32)", "set moe_intermediate_size=32")),
        ("qwen3_moe", more_experts, ("mlp.gate.weight has shape (5, 32), expected (4, 32)", "set num_experts=5")),
        ("llama", more_layers, ("holds 9 tensors", "num_hidden_layers=4: set num_hidden_layers=5")),
        ("llama", lambda t: t.pop(OUTPUT), (f"lacks the tensor {OUTPUT}", "set tie_word_embeddings=true")),
        ("qwen2", grow("q_proj.bias", 0, 4), ("q_proj.bias has shape (36,), expected (32,)",)),
        ("qwen2", lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"), ("lacks the tensor model.layers.1.self_a",)),
        (
            "llama",
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32).bfloat16()}),
            ("holds 1 tensors", "1 of them biases, first model.layers.0.self_attn.q_proj.bias"),
        ),
        ("llama", lambda t: t.update({"model.norm.weight": t["model.norm.weight"][None]}), ("has shape (1, 32)",)),
        (
            "llama",
            lambda t: t.update({"model.norm.weight": torch.zeros(0).bfloat16()}),
            ("model.norm.weight has shape (0,), expected (32,)",),
        ),
    ],
)
def test_field_cases_a12_whole_shapes_are_compared_before_any_slice(hf, tmp_path, kind, change, expected):
    message = refusal(changed(hf / kind, tmp_path / "model", change), tmp_path)
    for part in expected:
        assert part in message, message


def test_field_cases_a12_a_model_to_train_is_compared_before_anything_is_built(hf, tmp_path):
    from megatron_tropd.config import Recipe
    from megatron_tropd.training.run_teacher import check_teacher, load_student_tokenizer

    wide = str(changed(hf / "llama", tmp_path / "model", MLP))
    fine = Recipe(student=ModelConfig(hf_path=str(hf / "llama")), teacher=TeacherConfig(hf_path=wide))
    _, _, tokenizer = load_student_tokenizer(fine)
    for call in (
        lambda: check_teacher(fine, tokenizer),
        lambda: load_student_tokenizer(Recipe(student=ModelConfig(hf_path=wide))),
    ):
        with pytest.raises(UserError, match=r"\(64, 32\), expected \(48, 32\)"):
            call()


def _split(folder, first, second, index=None):
    """Distribute a folder's tensors over two files; `index`: its weight_map."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for number, choose in ((1, first), (2, second)):
        part = {name: tensor for name, tensor in tensors.items() if choose(name)}
        save_file(part, folder / f"model-0000{number}-of-00002.safetensors", metadata={"format": "pt"})
    if index:
        weight_map = {name: f"model-0000{1 if index(name) else 2}-of-00002.safetensors" for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_field_cases_a12_a_tensor_twice_or_elsewhere_than_its_index_says(hf, tmp_path):
    def in_first(name):
        return "layers.0" in name

    twice = _split(changed(hf / "llama", tmp_path / "twice"), lambda n: True, in_first, lambda n: not in_first(n))
    assert "is in model-00001-of-00002.safetensors and in model-00002" in refusal(twice, tmp_path)
    wrong = _split(changed(hf / "llama", tmp_path / "wrong"), in_first, lambda n: not in_first(n), lambda n: True)
    assert "names lm_head.weight in model-00001-of-00002.safetensors, which lacks it" in refusal(wrong, tmp_path)
    no_index = _split(changed(hf / "llama", tmp_path / "no_index"), in_first, lambda n: not in_first(n))
    (no_index / "model-00002-of-00002.safetensors").unlink()
    assert "holds 1 parts of a model that was split into 00002" in refusal(no_index, tmp_path)
    both = shutil.copytree(wrong, tmp_path / "both")
    shutil.copy(hf / "llama" / "model.safetensors", both)
    assert "two models perhaps" in refusal(both, tmp_path)
    (both / "model.safetensors").unlink()
    (both / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json cannot be read" in refusal(both, tmp_path)


def test_field_cases_a12_a_part_in_a_folder_of_its_own_is_found_where_the_index_says(hf, tmp_path):
    folder = _split(
        changed(hf / "llama", tmp_path / "m"), lambda n: "3" in n, lambda n: "3" not in n, lambda n: "3" in n
    )
    (folder / "parts").mkdir()
    (folder / "model-00002-of-00002.safetensors").rename(folder / "parts" / "model-00002-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002", "parts/model-00002"))
    run_distributed(_convert, 1, str(folder), str(tmp_path / "c"))
    theirs, ours = (load_file(Path(p) / "model.safetensors") for p in (hf / "llama", tmp_path / "c_hf"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_field_cases_b8_weights_that_are_not_finite_are_not_converted(hf, tmp_path, value):
    folder = changed(
        hf / "llama", tmp_path / "m", lambda t: t["model.layers.2.mlp.up_proj.weight"][3, 5:6].fill_(value)
    )
    for options in ({}, {"verify": True}):
        message = refusal(folder, tmp_path, **options)
        assert f"NaN or infinity in the model's weights as read from {folder}" in message
        assert "decoder.layers.2.mlp.linear_fc1.weight on rank 0" in message


def test_field_cases_b15_a_cache_of_links_to_files_that_nobody_may_write(hf, tmp_path):
    """A snapshot of the hub's cache on a disk that is shared: the copies are the user's own."""
    folder = changed(hf / "llama", tmp_path / "m")
    (tmp_path / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = file.rename(tmp_path / "blobs" / str(number))
        blob.chmod(0o444)
        file.symlink_to(f"../blobs/{number}")
    run_distributed(_convert, 1, str(folder), str(tmp_path / "c"))
    for copies in (tmp_path / "c" / "hf", tmp_path / "c_hf"):
        names = {file.name for file in copies.iterdir()}
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= names
        assert all(file.stat().st_mode & 0o200 and not file.is_symlink() for file in copies.iterdir())


def _load_changed(folder, checkpoint, layout):
    """Load a checkpoint into the model that another folder's config describes; the message."""
    from megatron_tropd.models.build import build_model, load_hf_config

    groups = initialize(layout)
    chunks = build_model(load_hf_config(folder), layout, groups)
    try:
        convert.load_checkpoint_weights(chunks, checkpoint, groups)
    except UserError as error:
        return str(error)
    return None


def _convert_and_load(source, checkpoint, folders):
    convert.convert_hf_to_mcore(source, checkpoint)
    return [_load_changed(folder, checkpoint, ModelConfig(dtype="bfloat16")) for folder in folders]


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("llama", {"vocab_size": 300}, "embedding.word_embeddings.weight of shape (256, 32), expected (384, 32)"),
        ("llama", {"intermediate_size": 64}, "linear_fc1.weight of shape (4, 96, 32), expected (4, 128, 32)"),
        ("llama", {"num_hidden_layers": 3}, "of shape (4, "),
        ("llama", {"tie_word_embeddings": True}, "holds 1 tensors that the model does not have, first output_layer"),
        ("llama_tied", {"tie_word_embeddings": False}, "lacks the tensor output_layer.weight"),
        ("qwen2", {"model_type": "llama", "architectures": None}, "holds 1 tensors that the model does not have"),
    ],
)
def test_field_cases_a12_checkpoints_of_megatron_are_compared_too(hf, tmp_path, kind, fields, expected):
    other = changed(hf / kind, tmp_path / "other", config=fields)
    (messages,) = run_distributed(
        _convert_and_load, 1, str(hf / kind), str(tmp_path / "c"), [str(other), str(hf / kind)]
    )
    assert expected in messages[0]
    assert messages[1] is None


def _convert(source, output):
    initialize(ModelConfig())
    convert.convert_hf_to_mcore(source, output)
    convert.convert_mcore_to_hf(output, output + "_hf")


def test_field_cases_a15_a_tied_model_with_another_output_layer(hf, tmp_path):
    def other(tensors):
        tensors[OUTPUT] = tensors[EMBEDDING].clone()
        tensors[OUTPUT][-1, -1] += 1

    folder = changed(hf / "llama_tied", tmp_path / "other", other)
    message = refusal(folder, tmp_path)
    assert "says tie_word_embeddings=true, and the files hold another lm_head.weight" in message
    assert "Set tie_word_embeddings=false" in message
    wide = changed(hf / "llama_tied", tmp_path / "wide", lambda t: t.update({OUTPUT: t[EMBEDDING][:, :16]}))
    assert "lm_head.weight has shape (131, 16), expected (131, 32)" in refusal(wide, tmp_path)
    same = changed(hf / "llama_tied", tmp_path / "same", lambda t: t.update({OUTPUT: t[EMBEDDING].clone()}))
    fp32 = changed(hf / "llama_tied", tmp_path / "fp32", lambda t: t.update({OUTPUT: t[EMBEDDING].float()}))
    for folder in (same, fp32):
        run_distributed(_convert, 1, str(folder), str(tmp_path / f"{folder.name}_c"))
        assert OUTPUT not in load_file(tmp_path / f"{folder.name}_c_hf" / "model.safetensors")


def rename(function):
    def change(tensors):
        for name in list(tensors):
            tensors[function(name)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (lambda n: f"_orig_mod.{n}", "torch.compile's names: save model._orig_mod"),
        (lambda n: n.replace("layers.0.", "layers.0._orig_mod."), "torch.compile's names"),
        (lambda n: f"module.{n}", "save model.module instead"),
        (lambda n: f"base_model.model.{n}", "merge_and_unload() with peft"),
        (lambda n: n.replace("q_proj.weight", "q_proj.base_layer.weight"), "an adapter that is not merged"),
        (lambda n: n.replace("o_proj.weight", "o_proj.lora_A.default.weight"), "an adapter that is not merged"),
        (lambda n: n.removeprefix("model."), "AutoModelForCausalLM"),
        (lambda n: f"language_model.{n}", "a model of text and images"),
        (lambda n: f"_fsdp_wrapped_module.{n}", "FSDP's names"),
    ],
)
def test_field_cases_b15_wrappers_in_the_names(hf, tmp_path, function, remedy):
    message = refusal(changed(hf / "llama", tmp_path / "model", rename(function)), tmp_path)
    assert remedy in message
    assert str(tmp_path / "model") in message


def test_field_cases_b15_other_files_beside_the_weights_are_passed_over(hf, tmp_path):
    folder = changed(hf / "llama", tmp_path / "model")
    junk = {"layers.0.attention.wq.weight": torch.ones(3, 3), EMBEDDING: torch.ones(2)}
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        save_file(junk, folder / name)
    (folder / "original").mkdir()
    save_file(junk, folder / "original" / "model.safetensors")
    (folder / "adapter_config.json").write_text("{}")
    for name in ("training_args.bin", "pytorch_model.bin", "trainer_state.json"):
        (folder / name).write_bytes(b"junk")
    run_distributed(_convert, 1, str(folder), str(tmp_path / "c"))
    theirs, ours = (load_file(Path(p) / "model.safetensors") for p in (hf / "llama", tmp_path / "c_hf"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("adapter_model.safetensors", "an adapter alone"),
        ("pytorch_model.bin", "weights_only=True"),
        ("pytorch_model-00001-of-00002.bin", "weights_only=True"),
        ("consolidated.safetensors", "consolidated.* alone"),
        ("model-q4.gguf", "GGUF"),
        ("weights.safetensors", "(weights.safetensors are not read)"),
    ],
)
def test_field_cases_b15_a_folder_of_other_files_alone_names_the_way(hf, tmp_path, file, expected):
    folder = changed(hf / "llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / file)
    message = refusal(folder, tmp_path)
    assert "holds no model*.safetensors files" in message
    assert expected in message


def test_a_pointer_of_git_lfs_is_named(hf, tmp_path):
    folder = changed(hf / "llama", tmp_path / "model")
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refusal(folder, tmp_path)


def fuse(kind):
    """Return a change to the names and the fused experts with which transformers 5 can save a model."""

    def change(tensors):
        names = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        block = "block_sparse_moe" if kind == "mixtral" else "mlp"
        for i in range(4):
            head = f"model.layers.{i}."
            if f"{head}{block}.gate.weight" not in tensors:
                continue
            tensors[f"{head}mlp.gate.weight"] = tensors.pop(f"{head}{block}.gate.weight")
            gate, up, down = (
                torch.stack([tensors.pop(f"{head}{block}.experts.{e}.{name}.weight") for e in range(4)])
                for name in names
            )
            tensors[f"{head}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            tensors[f"{head}mlp.experts.down_proj"] = down

    return change


def _convert_on_two(sources, root):
    initialize(ModelConfig())
    for source in sources:
        name = Path(source).parent.name
        layout = {"tensor_model_parallel_size": 2}
        convert.convert_hf_to_mcore(source, f"{root}/{name}", verify=True, **layout)
        convert.convert_mcore_to_hf(f"{root}/{name}", f"{root}/{name}_hf", expert_model_parallel_size=2)


def test_field_cases_b15_experts_fused_by_transformers_5_are_read_exactly(hf, tmp_path):
    folders = [changed(hf / kind, tmp_path / kind / "fused", fuse(kind)) for kind in ("mixtral", "qwen3_moe")]
    run_distributed(_convert_on_two, 2, [str(folder) for folder in folders], str(tmp_path / "out"))
    for kind in ("mixtral", "qwen3_moe"):
        ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path / "out" / f"{kind}_hf", hf / kind))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "down_proj" in refusal(
        changed(folders[1], tmp_path / "cut", lambda t: t.pop("model.layers.0.mlp.experts.down_proj")),
        tmp_path / "none",
    )


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "FP8"),
        ({"quant_method": "fbgemm_fp8"}, "FP8 (fbgemm)"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "compressed-tensors"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "brand_new"}, "brand_new"),
    ],
)
def test_field_cases_b14_a_quantised_config_is_named(hf, tmp_path, settings, method):
    folder = changed(hf / "llama", tmp_path / "model", config={"quantization_config": settings})
    message = refusal(folder, tmp_path)
    assert f"quantised weights (quantization_config: {method})" in message
    assert "dequantise it with transformers" in message


@pytest.mark.parametrize(
    ("change", "method"),
    [
        (lambda t: t.update({"model.layers.0.mlp.up_proj.qweight": torch.ones(4, 8).int()}), "GPTQ or AWQ"),
        (
            lambda t: t.update({f"model.layers.0.mlp.up_proj.{n}": torch.ones(4).int() for n in ("g_idx", "qzeros")}),
            "GPTQ",
        ),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}), "FP8"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight.absmax": torch.ones(4)}), "bitsandbytes"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.SCB": torch.ones(48)}), "bitsandbytes"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.weight_packed": torch.ones(4).int()}), "compressed-tensors"),
        (lambda t: t.update({"model.layers.0.mlp.experts.down_proj_blocks": torch.ones(4).byte()}), "MXFP4"),
        (lambda t: t.update({n: v.to(torch.float8_e4m3fn) for n, v in t.items() if "up_proj" in n}), "FP8: tensor"),
        (lambda t: t.update({n: v.to(torch.int8) for n, v in t.items() if "up_proj" in n}), "I8: tensor"),
    ],
)
def test_field_cases_b14_quantised_tensors_without_a_word_in_the_config(hf, tmp_path, change, method):
    message = refusal(changed(hf / "llama", tmp_path / "model", change), tmp_path)
    assert f"holds quantised weights ({method}" in message
    assert "dequantise it with transformers" in message


def test_field_cases_b14_quantised_models_are_named_by_every_command(hf, tmp_path):
    folder = changed(hf / "llama", tmp_path / "model", config={"quantization_config": {"quant_method": "awq"}})
    from megatron_tropd.cli import main

    for command in (
        ["plan", f"student.hf_path={folder}", f"teacher.hf_path={folder}"],
        ["train", f"student.hf_path={folder}", f"teacher.hf_path={folder}", "data.prompts=none.jsonl"],
        ["convert", "hf-to-mcore", "--hf-path", str(folder), "--output", str(tmp_path / "out")],
    ):
        assert main(command) == 2
    run_distributed(_convert, 1, str(hf / "llama"), str(tmp_path / "c"))
    shutil.copy(folder / "config.json", tmp_path / "c" / "hf" / "config.json")
    manifest = json.loads((tmp_path / "c" / "complete.json").read_text())
    manifest["hf/config.json"] = (folder / "config.json").stat().st_size
    (tmp_path / "c" / "complete.json").write_text(json.dumps(manifest))
    assert main(["convert", "mcore-to-hf", "--checkpoint", str(tmp_path / "c"), "--output", str(tmp_path / "b")]) == 2
