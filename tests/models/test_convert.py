"""Weights survive the way to Megatron and back bit for bit under every layout, and damaged input is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from safetensors.torch import load_file, save_file
from support.helpers import run_distributed
from support.tiny_models import KINDS, VOCAB_SIZE, load_transformers, write_model
from transformers import AutoTokenizer

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.files import SafetensorsFolder
from megatron_tropd.machine import host_memory
from megatron_tropd.models import build as model_module
from megatron_tropd.models import convert, verify
from megatron_tropd.models.build import build_model, load_hf_config, transformer_config
from megatron_tropd.models.hf_weights import load_hf_weights, named_parameters, save_hf_weights
from megatron_tropd.models.sharded_checks import stored_tensors
from megatron_tropd.models.verify import full_logits
from megatron_tropd.parallel.groups import initialize, shutdown

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MODELS = [f"{kind}_{dtype}" for kind in KINDS for dtype in DTYPES]


def _layout(tp, pp):
    return {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}


def _run(jobs):
    """Call functions of convert.py one after the other; the message of each one's UserError, None without."""
    initialize(ModelConfig())  # groups that are there before stay: the next job takes the same processes
    messages = []
    for name, arguments, options in jobs:
        try:
            getattr(convert, name)(*arguments, **options)
            messages.append(None)
        except UserError as error:
            messages.append(str(error))
    return messages


def _convert(world_size, jobs):
    """Run the jobs on `world_size` ranks, which must agree."""
    first, *others = run_distributed(_run, world_size, jobs)
    assert all(other == first for other in others)
    return first


def _tensors(folder):
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & tensors.keys()
        tensors.update(part)
    return tensors


def _assert_identical(folder, other):
    ours, theirs = _tensors(folder), _tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """Folders of every kind and dtype; those in fp32 are split over several files with an index."""
    root = tmp_path_factory.mktemp("hf")
    for name in MODELS:
        kind, dtype = name.rsplit("_", 1)
        write_model(root / name, kind, DTYPES[dtype], max_shard_size="40KB" if dtype == "fp32" else "1GB")
    return root


LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


def _written_at(name):
    """The layout that writes a model's checkpoint: each layout writes some."""
    return LAYOUTS[MODELS.index(name) % 4]


def _read_at(name):
    """Another layout, which reads it."""
    return LAYOUTS[3 - MODELS.index(name) % 4]


@pytest.fixture(scope="module")
def checkpoints(hf, tmp_path_factory):
    """A checkpoint of every folder, verified against transformers while it was written."""
    root = tmp_path_factory.mktemp("checkpoints")
    for world_size in (1, 2, 4):
        names = [n for n in MODELS if _written_at(n)[0] * _written_at(n)[1] == world_size]
        jobs = [
            ("convert_hf_to_mcore", (hf / n, root / n), {"verify": True, **_layout(*_written_at(n))}) for n in names
        ]
        assert _convert(world_size, jobs) == [None] * len(names)
    return root


def test_there_and_back_is_bit_identical_though_the_layout_changes(hf, checkpoints, tmp_path):
    for world_size in (1, 2, 4):
        names = [n for n in MODELS if _read_at(n)[0] * _read_at(n)[1] == world_size]
        jobs = [("convert_mcore_to_hf", (checkpoints / n, tmp_path / n), _layout(*_read_at(n))) for n in names]
        assert _convert(world_size, jobs) == [None] * len(names)
    for name in MODELS:
        _assert_identical(hf / name, tmp_path / name)


def test_experts_are_converted_under_expert_parallelism(hf, tmp_path):
    shared, names = (
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2},
        ("mixtral_fp32", "qwen3_moe_bf16"),
    )
    there = [("convert_hf_to_mcore", (hf / n, tmp_path / n), {"verify": True, **shared}) for n in names]
    ep4 = {"expert_model_parallel_size": 4}
    back = [("convert_mcore_to_hf", (tmp_path / n, tmp_path / f"{n}_ep4"), ep4) for n in names]
    assert _convert(4, there + back) == [None] * 4
    back = [("convert_mcore_to_hf", (tmp_path / n, tmp_path / f"{n}_whole"), _layout(1, 1)) for n in names]
    assert _convert(1, back) == [None] * 2
    for name in names:
        _assert_identical(hf / name, tmp_path / f"{name}_whole")
        _assert_identical(hf / name, tmp_path / f"{name}_ep4")


def test_several_input_files_are_read_through_their_index(hf):
    assert len(list((hf / "llama_fp32").glob("*.safetensors"))) > 3
    assert (hf / "llama_fp32" / "model.safetensors.index.json").exists()
    assert len(list((hf / "llama_bf16").glob("*.safetensors"))) == 1


def test_an_exported_folder_is_complete(hf, checkpoints, tmp_path):
    shutil.copytree(checkpoints / "qwen3_bf16", tmp_path / "step" / "model")  # where a training checkpoint keeps it
    (tmp_path / "empty").mkdir()  # an empty folder may be there
    jobs = [
        ("convert_mcore_to_hf", (tmp_path / "step", tmp_path / "empty"), {}),
        ("convert_mcore_to_hf", (checkpoints / "qwen3_bf16", tmp_path / "fp32"), {"dtype": "float32"}),
    ]
    assert _convert(1, jobs) == [None, None]
    original = load_transformers(hf / "qwen3_bf16")
    tokens = torch.arange(20)[None]
    for folder, dtype in (("empty", torch.bfloat16), ("fp32", torch.float32)):
        assert load_transformers(tmp_path / folder).dtype == dtype
        model = load_transformers(tmp_path / folder, torch.bfloat16)
        assert torch.equal(model(tokens).logits, original(tokens).logits)
        assert AutoTokenizer.from_pretrained(tmp_path / folder).eos_token_id == 2
        assert (tmp_path / folder / "generation_config.json").exists()


def _split_and_logits(hf_path, tokens, output, tp, pp):
    """Load, write files of at most 10 kB; return the vocabulary's shards and the last stage's logits."""
    model = ModelConfig(hf_path=hf_path, dtype="float32", **_layout(tp, pp))
    groups = initialize(model)
    hf_config = load_hf_config(hf_path)
    chunks = build_model(hf_config, model, groups, training=False)
    load_hf_weights(chunks, hf_config, hf_path, groups)
    if groups.rank == 0:
        Path(output).mkdir()
    torch.distributed.barrier()
    save_hf_weights(chunks, hf_config, output, groups, max_file_bytes=10_000)
    shards = {n: p.detach().clone() for n, p, rule in named_parameters(chunks, hf_config) if rule.kind == "vocab"}
    return shards, full_logits(chunks, tokens, groups, hf_config.vocab_size)


@pytest.fixture(scope="module")
def split(hf, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    tokens = torch.randint(VOCAB_SIZE, (2, 20), generator=torch.Generator().manual_seed(1))
    path = str(hf / "llama_fp32")
    whole = run_distributed(_split_and_logits, 1, path, tokens, str(root / "11"), 1, 1)
    return root, whole, run_distributed(_split_and_logits, 4, path, tokens, str(root / "22"), 2, 2)


def test_small_output_files_hold_the_same_tensors(hf, split):
    for folder in ("11", "22"):
        files = sorted((split[0] / folder).glob("*.safetensors"))
        assert len(files) > 4
        assert all(len(load_file(f)) == 1 or f.stat().st_size < 15_000 for f in files)
        index = json.loads((split[0] / folder / "model.safetensors.index.json").read_text())
        assert {f.name for f in files} == set(index["weight_map"].values())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in _tensors(split[0] / folder).values())
        _assert_identical(hf / "llama_fp32", split[0] / folder)
        assert not list((split[0] / folder).glob(".*"))
    for file in (hf / "llama_fp32").glob("*.json"):
        shutil.copy(file, split[0] / "22") if "index" not in file.name else None
    load_transformers(split[0] / "22")


def test_padding_of_the_vocabulary_is_at_the_end_only(hf, checkpoints, split):
    embedding = _tensors(hf / "llama_fp32")["model.embed_tokens.weight"]
    ranks = split[2]  # tensor-parallel ranks run fastest: 0 and 1 hold the first stage
    padded = torch.cat(
        [ranks[0][0]["embedding.word_embeddings.weight"], ranks[1][0]["embedding.word_embeddings.weight"]]
    )
    assert torch.equal(padded[:VOCAB_SIZE], embedding)
    assert padded.shape[0] == 256
    assert not padded[VOCAB_SIZE:].any()
    shapes = set()
    for name in ("llama_bf16", "llama_fp32", "llama_tied_bf16", "llama_tied_fp32"):
        tensors = stored_tensors(checkpoints / name)
        shapes |= {tuple(t.global_shape) for key, t in tensors.items() if "word_embeddings" in key}
    assert shapes == {(256, 32)}


def test_logits_do_not_depend_on_the_layout(split):
    (whole,), ranks = split[1:]
    assert whole[1].shape == (2, 20, VOCAB_SIZE)
    assert [rank[1] is None for rank in ranks] == [True, True, False, False]
    for rank in ranks[2:]:
        torch.testing.assert_close(rank[1], whole[1], atol=1e-5, rtol=1e-5)


def _load_as_float32(checkpoint, hf_path):
    model = ModelConfig(checkpoint=checkpoint, dtype="float32", **_layout(2, 1))
    groups = initialize(model)
    hf_config = load_hf_config(convert.resolve_hf_path(model))
    chunks = build_model(hf_config, model, groups)
    convert.load_model_weights(chunks, model, groups)
    loaded = [p.detach().clone() for p in chunks[0].parameters()]
    convert.load_model_weights(chunks, replace(model, checkpoint=None, hf_path=hf_path), groups)
    return [(a.dtype, torch.equal(a, b)) for a, b in zip(loaded, chunks[0].parameters(), strict=True)]


def test_a_bf16_checkpoint_fills_an_fp32_model(hf, checkpoints):
    for rank in run_distributed(_load_as_float32, 2, str(checkpoints / "llama_bf16"), str(hf / "llama_bf16")):
        assert set(rank) == {(torch.float32, True)}


class _Experts(torch.nn.Module):
    """Two experts' weights, named as Transformer Engine's grouped layer names them; `extra`: with its extra states."""

    def __init__(self, extra):
        super().__init__()
        self.extra = extra
        self.weight0, self.weight1 = (torch.nn.Parameter(torch.randn(3, 2)) for _ in range(2))

    def sharded_state_dict(self, metadata=None):
        state = {name: ShardedTensor.from_rank_offsets(name, weight) for name, weight in self.named_parameters()}
        names = ("_extra_state", "_extra_state1") if self.extra else ()
        return state | {name: ShardedObject(name, torch.zeros(0), (1,), (0,)) for name in names}

    def get_extra_state(self):
        return torch.zeros(0)

    def set_extra_state(self, state):
        raise AssertionError("no extra state is stored")


def _exchange_experts(folder, hf_path):
    initialize(ModelConfig())
    for i, (written, read) in enumerate([(False, True), (True, False)]):
        source, target = _Experts(written), _Experts(read)
        convert.save_checkpoint_weights([source], f"{folder}/{i}", hf_path)
        convert.load_checkpoint_weights([target], f"{folder}/{i}")
        assert all(map(torch.equal, source.parameters(), target.parameters()))


def test_experts_interchange_with_a_layer_that_numbers_its_extra_states(hf, tmp_path):
    run_distributed(_exchange_experts, 1, str(tmp_path), str(hf / "llama_bf16"))


def test_a_failing_verification_leaves_nothing_behind(hf, tmp_path):
    job = (
        "convert_hf_to_mcore",
        (hf / "qwen2_fp32", tmp_path / "out"),
        {"verify": True, "bound": 0.0, **_layout(2, 1)},
    )
    (message,) = _convert(2, [job])
    assert "more than the bound of 0" in message
    assert not list(tmp_path.iterdir())


def _verify_where_transformer_engine_is_importable(hf_path):
    """Verify a model on a machine that says it has Transformer Engine: of its layers nothing could be built."""
    model_module.uses_transformer_engine = lambda: True
    layout = ModelConfig(hf_path=hf_path, dtype="bfloat16")
    torch.set_float32_matmul_precision("high")  # what some containers make the default on CUDA
    verify.verify_model(hf_path, layout, initialize(layout))
    return torch.get_float32_matmul_precision()


@pytest.mark.parametrize("name", ["qwen3_bf16", "mixtral_bf16"])
def test_what_is_verified_is_of_local_layers(name, hf):
    assert run_distributed(_verify_where_transformer_engine_is_importable, 1, str(hf / name)) == ["high"]


def _verify_on_a_host_of(memory, jobs):
    verify.available_host_bytes = lambda: memory
    return _run(jobs)


def test_a_verification_that_the_host_has_no_memory_for_is_refused_first(hf, tmp_path):
    folder = hf / "llama_tied_fp32"
    tensors = _tensors(folder)
    whole = sum(t.numel() * 4 for t in tensors.values())
    layer = sum(t.numel() * 4 for name, t in tensors.items() if "layers.0." in name)
    ends = whole - 4 * layer  # embedding and final norm; tied, the embedding is held as output layer, too
    assert verify.model_bytes(load_hf_config(folder)) == whole
    for world_size in (1, 2):  # one layer and the ends of transformers', and each rank's part of Megatron's
        needed = layer + 2 * ends + (whole - 2 * layer) // world_size
        job = ("convert_hf_to_mcore", (folder, tmp_path / "out"), {"verify": True, **_layout(world_size, 1)})
        for (message,) in run_distributed(_verify_on_a_host_of, world_size, needed - 1, [job]):
            assert "verification needs 0.0 GB of host memory, for 2 layers in fp32" in message
            assert "without --verify" in message
        assert not list(tmp_path.iterdir())
        ranks = run_distributed(_verify_on_a_host_of, world_size, needed, [job])
        assert ranks == [[None]] * world_size
        shutil.rmtree(tmp_path / "out")


def test_limits_of_a_container_bound_the_host_memory(tmp_path):
    whole = host_memory.available_host_bytes(tmp_path)
    assert whole > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 300\n")
    assert host_memory.available_host_bytes(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("1500\n")
    assert host_memory.available_host_bytes(tmp_path) == 1500 - 1000 + 300


def _changed_weights(hf, folder, change):
    """Copy a folder and let `change` edit its tensors; return the copy."""
    shutil.copytree(hf / "llama_bf16", folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_weights_that_do_not_match_their_config_are_refused(hf, tmp_path):
    o_proj = "model.layers.2.self_attn.o_proj.weight"
    lacking = _changed_weights(hf, tmp_path / "lacking", lambda t: t.pop(o_proj))
    extra = _changed_weights(hf, tmp_path / "extra", lambda t: t.update({"model.layers.4.norm.weight": torch.ones(2)}))
    shape = _changed_weights(hf, tmp_path / "shape", lambda t: t.update({o_proj: torch.ones(32, 30).bfloat16()}))
    integer = _changed_weights(hf, tmp_path / "int", lambda t: t.update({n: v.to(torch.int8) for n, v in t.items()}))
    jobs = [("convert_hf_to_mcore", (f, tmp_path / "out"), {}) for f in (lacking, extra, shape, integer)]
    messages = _convert(1, jobs)
    assert f"lacks the tensor {o_proj}" in messages[0]
    assert "holds 1 tensors" in messages[1]
    assert "first model.layers.4.norm.weight" in messages[1]
    assert "(32, 30)" in messages[2]
    assert "expected (32, 32)" in messages[2]
    assert "is of I8" in messages[3]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_read_is_named(hf, tmp_path):
    with pytest.raises(UserError, match=r"nowhere/config\.json cannot be read"):
        convert.convert_hf_to_mcore(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="'gpt2' is not supported; expected one of llama, qwen2, qwen3"):
        convert.convert_hf_to_mcore(tmp_path, tmp_path / "out")
    shutil.copy(hf / "llama_fp32" / "config.json", tmp_path / "config.json")
    with pytest.raises(UserError, match=r"holds no model\*\.safetensors files"):
        convert.convert_hf_to_mcore(tmp_path, tmp_path / "out")


def test_files_that_are_cut_short_or_missing_are_named(hf, tmp_path):
    folder = shutil.copytree(hf / "llama_fp32", tmp_path / "model")
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"{file.name} is cut short"):
        convert.convert_hf_to_mcore(folder, tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is named in model.safetensors.index.json and missing"):
        SafetensorsFolder(folder)


def test_an_existing_output_is_refused(hf, checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    for call in (
        lambda: convert.convert_hf_to_mcore(hf / "llama_fp32", tmp_path),
        lambda: convert.convert_mcore_to_hf(checkpoints / "llama_fp32", tmp_path),
        lambda: convert.convert_mcore_to_hf(checkpoints / "llama_fp32", tmp_path / "file"),
    ):
        with pytest.raises(UserError, match="exists already"):
            call()


def test_a_checkpoint_cut_short_is_refused_with_the_file(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints / "llama_bf16", tmp_path / "c")
    file = sorted(folder.glob("*.distcp"))[0]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"{file.name} has {len(whole) - 1} bytes instead of {len(whole)}"):
        convert.convert_mcore_to_hf(folder, tmp_path / "out")
    file.unlink()
    model = ModelConfig(checkpoint=str(folder))
    with pytest.raises(UserError, match=rf"student\.checkpoint=.*{file.name} is missing"):
        convert.resolve_hf_path(model, "student")
    (folder / "complete.json").unlink()
    with pytest.raises(UserError, match=r"complete\.json is missing"):
        convert.resolve_hf_path(model)


def test_paths_that_do_not_fit_together_are_refused(hf, checkpoints, tmp_path):
    with pytest.raises(UserError, match=r"student\.hf_path=.*no such folder"):
        convert.resolve_hf_path(ModelConfig(hf_path=str(tmp_path / "no")), "student")
    with pytest.raises(UserError, match=r"teacher\.checkpoint=.*no such folder"):
        convert.resolve_hf_path(ModelConfig(checkpoint=str(tmp_path / "no")), "teacher")
    llama = str(checkpoints / "llama_bf16")
    with pytest.raises(UserError, match="model_type is llama there and qwen2 here"):
        convert.resolve_hf_path(ModelConfig(checkpoint=llama, hf_path=str(hf / "qwen2_bf16")))
    with pytest.raises(UserError, match="tie_word_embeddings is False there and True here"):
        convert.resolve_hf_path(ModelConfig(checkpoint=llama, hf_path=str(hf / "llama_tied_bf16")))
    shutil.copytree(llama, tmp_path / "step" / "model")
    with pytest.raises(UserError, match="is a training checkpoint; its weights are in"):
        convert.resolve_hf_path(ModelConfig(checkpoint=str(tmp_path / "step")))
    model = ModelConfig(checkpoint=llama, hf_path=str(hf / "llama_bf16"))
    assert convert.resolve_hf_path(model) == hf / "llama_bf16"
    assert convert.resolve_hf_path(replace(model, hf_path=None)) == checkpoints / "llama_bf16" / "hf"


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ((3, 1), r"tensor_model_parallel_size=3 does not divide .*4 attention heads, 2 key/value.*one of \[1, 2\]"),
        ((1, 3), r"pipeline_model_parallel_size=3 does not divide the model's 4 layers; use one of \[1, 2, 4\]"),
    ],
)
def test_a_layout_that_does_not_divide_the_model_names_those_that_do(hf, layout, message):
    with pytest.raises(UserError, match=message):
        transformer_config(load_hf_config(hf / "llama_bf16"), ModelConfig(**_layout(*layout)))


def test_virtual_stages_must_divide_a_stage(hf):
    model = ModelConfig(**_layout(1, 2), virtual_pipeline_model_parallel_size=3)
    with pytest.raises(
        UserError, match=r"=3 does not divide the 2 layers of a pipeline stage; use one of \[2\] or null"
    ):
        transformer_config(load_hf_config(hf / "llama_bf16"), model)
    shutdown()  # twice is harmless, and without groups too


def _spoil(folder, name, content):
    """Replace a file's content by another of the same size: a checkpoint's list of files then says nothing."""
    file = next(folder.glob(name))
    size = file.stat().st_size
    file.write_bytes(content.encode().ljust(size, b" ")[:size] if content else bytes(size))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("__0_0.distcp", "", "cannot be read"),
        ("metadata.json", "{", "metadata.json|cannot be read"),
        ("complete.json", "[]", "complete.json is missing or unreadable"),
        ("tensor_dtypes.json", "{", "tensor_dtypes.json cannot be read"),
        ("tensor_dtypes.json", '{"default": "nothing", "others": {}}', "tensor_dtypes.json cannot be read"),
        ("tensor_dtypes.json", '{"default": "bfloat16", "others": 3}', "tensor_dtypes.json cannot be read"),
    ],
)
def test_field_cases_b5_spoiled_files_of_a_checkpoint_are_one_line(checkpoints, tmp_path, name, content, expected):
    folder = shutil.copytree(checkpoints / "qwen3_bf16", tmp_path / "c")
    if name == "tensor_dtypes.json":
        (folder / name).write_text(" " * 100)
    (message,) = _convert(1, [("convert_mcore_to_hf", (_spoil(folder, name, content), tmp_path / "out"), {})])
    assert any(part in message for part in expected.split("|"))
    assert "Traceback" not in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
