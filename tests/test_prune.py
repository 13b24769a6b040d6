"""Pruned students are the original with layers deleted, complete and loadable; mistakes leave nothing behind."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from support.tiny_models import VOCAB_SIZE, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

TOOL = Path(__file__).parents[1] / "tools" / "prune_student.py"
TOKENS = torch.randint(VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prune_student", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_model(root / "llama", "llama")
    write_model(root / "llama_tied", "llama_tied", max_shard_size="40KB")
    write_model(root / "qwen2", "qwen2", torch.bfloat16)
    write_model(root / "qwen3", "qwen3", max_shard_size="30KB")
    return root


def _prune(tool, model, output, *options):
    return tool.main(["--hf-path", str(model), "--output", str(output), *options])


def _logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "options", "kept"),
    [
        ("llama", ["--keep-layers", "0,2-3"], [0, 2, 3]),
        ("llama_tied", ["--drop-layers", "0-1"], [2, 3]),
        ("qwen2", ["--keep-layers", "3, 1"], [1, 3]),
        ("qwen3", ["--drop-layers", "0,1,3"], [2]),
        ("qwen3", ["--keep-layers", "0-3"], [0, 1, 2, 3]),
    ],
)
def test_a_pruned_model_is_the_original_with_layers_deleted(tool, models, tmp_path, kind, options, kept, capsys):
    assert _prune(tool, models / kind, tmp_path / "out", *options) == 0
    assert f"{len(kept)} layers" in capsys.readouterr().out
    original = AutoModelForCausalLM.from_pretrained(models / kind, dtype="auto")
    whole = _logits(original)
    original.model.layers = torch.nn.ModuleList(original.model.layers[i] for i in kept)
    original.config.num_hidden_layers = len(kept)
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert pruned.dtype == original.dtype
    assert torch.equal(_logits(pruned), _logits(original))
    assert torch.equal(_logits(pruned), whole) == (len(kept) == 4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(kept)
    assert len(config.get("layer_types", kept)) == len(kept)


def test_the_folder_is_complete_and_its_index_right(tool, models, tmp_path):
    assert _prune(tool, models / "qwen3", tmp_path / "out", "--keep-layers", "1,2") == 0
    names = {file.name for file in models.joinpath("qwen3").iterdir() if file.suffix != ".safetensors"}
    assert names <= {file.name for file in (tmp_path / "out").iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = {file.name: file for file in (tmp_path / "out").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(files)
    assert not any(".layers.2." in name for name in index["weight_map"])
    from safetensors.torch import load_file

    tensors = {name: tensor for file in files.values() for name, tensor in load_file(file).items()}
    assert tensors.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", models / "qwen3"))
    assert ours.get_vocab() == theirs.get_vocab()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_layer_types_follow_their_layers(tool, models, tmp_path):
    model = shutil.copytree(models / "qwen2", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    (model / "config.json").write_text(json.dumps({**config, "layer_types": types}))
    assert _prune(tool, model, tmp_path / "out", "--drop-layers", "1-2") == 0
    pruned = json.loads((tmp_path / "out" / "config.json").read_text())
    assert pruned["layer_types"] == ["full_attention", "sliding_attention"]
    assert {k: v for k, v in pruned.items() if k not in ("layer_types", "num_hidden_layers")} == {
        k: v for k, v in config.items() if k not in ("layer_types", "num_hidden_layers")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-layers", "0,4"], "--keep-layers=0,4: there is no layer 4; the model's are 0 to 3"),
        (["--drop-layers", "2-9"], "there is no layer 9"),
        (["--drop-layers", "0-3"], "--drop-layers=0-3 leaves none of the 4 layers"),
        (["--keep-layers", ""], "'' is no layer and no range"),
        (["--keep-layers", "3-1"], "'3-1' is no layer and no range; write for example 0-9,20-29"),
        (["--keep-layers", "0,x"], "'x' is no layer"),
        (["--keep-layers=-1"], "'-1' is no layer"),
    ],
)
def test_layers_that_do_not_exist_are_refused(tool, models, tmp_path, options, message, capsys):
    assert _prune(tool, models / "llama", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_and_an_empty_one_used(tool, models, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert _prune(tool, models / "llama", tmp_path / "empty", "--keep-layers", "0") == 0
    assert _prune(tool, models / "llama", tmp_path / "empty", "--keep-layers", "0") == 2
    assert "exists already" in capsys.readouterr().err


def test_folders_that_cannot_be_used_are_named(tool, models, tmp_path, capsys):
    def error(folder):
        assert _prune(tool, folder, tmp_path / "out", "--keep-layers", "0") == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "config.json cannot be read" in error(tmp_path / "nowhere")
    model = shutil.copytree(models / "qwen3", tmp_path / "model")
    file = sorted(model.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1])
    assert f"{file.name} is missing, cut short" in error(model)
    file.write_bytes(b"1234")
    assert f"{file.name} is missing, cut short" in error(model)
    file.unlink()
    assert f"{file.name} is named in model.safetensors.index.json and missing" in error(model)
    for left in model.glob("*.safetensors*"):
        left.unlink()
    assert "holds no model*.safetensors files" in error(model)
    (model / "config.json").write_text("{}")
    assert "has no num_hidden_layers" in error(model)
    model = shutil.copytree(models / "llama", tmp_path / "five")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))
    assert "says 5 layers, and layer 4 is missing" in error(model)
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "says 3 layers, and layer 3 is one too many" in error(model)


def test_an_interrupted_run_leaves_nothing_behind(tool, models, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "_copy_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _prune(tool, models / "llama", tmp_path / "out", "--keep-layers", "0")
    assert not list(tmp_path.iterdir())
