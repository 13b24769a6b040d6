"""What a plan says that a model weighs and keeps, against real models: parameters exactly, activations within 10 %."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import write_model

from megatron_tropd.config import ModelConfig
from megatron_tropd.models.build import load_hf_config
from megatron_tropd.planning.sizes import layer_activations, stage_layers, stage_parameters

KINDS = ("llama", "llama_tied", "qwen2", "qwen3", "mixtral", "qwen3_moe")
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        write_model(folder / kind, kind, **SIZES)
    return folder


def layout(tp=1, pp=1, **others) -> ModelConfig:
    return ModelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **others)


def parameters_rank(path, model):
    from megatron_tropd.models.build import build_model
    from megatron_tropd.parallel import groups as parallel

    groups = parallel.initialize(model)
    chunks = build_model(load_hf_config(path), model, groups)
    return groups.pp_rank, sum(p.numel() for chunk in chunks for p in chunk.parameters())


LAYOUTS = [layout(), layout(tp=2), layout(pp=2, num_layers_in_first_pipeline_stage=1)]
EXPERT_LAYOUTS = [layout(expert_model_parallel_size=4), layout(tp=2, expert_model_parallel_size=2)]


@pytest.mark.parametrize(
    ("kind", "model"),
    [*itertools.product(KINDS, LAYOUTS), *itertools.product(("mixtral", "qwen3_moe"), EXPERT_LAYOUTS)],
    ids=str,
)
def test_parameters_are_those_of_the_model(kind, model, folder):
    ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.expert_model_parallel_size
    expected = stage_parameters(load_hf_config(folder / kind), model)
    for stage, count in run_distributed(parameters_rank, ranks, folder / kind, model):
        assert count == expected[stage].total


def test_layers_are_dealt_to_stages_as_megatron_deals_them():
    assert stage_layers(8, layout(pp=4)) == [2, 2, 2, 2]
    assert stage_layers(9, layout(pp=4, num_layers_in_first_pipeline_stage=3)) == [3, 2, 2, 2]
    assert stage_layers(9, layout(pp=2, num_layers_in_last_pipeline_stage=4)) == [5, 4]
    both = {"account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True}
    assert stage_layers(10, layout(pp=3, **both)) == [3, 4, 3]


def saved_bytes_rank(path, model, length, **overrides):
    """Bytes that the model's layers keep for the backward pass: of four layers less of two."""
    from megatron_tropd.models.build import build_model
    from megatron_tropd.parallel import groups as parallel

    groups, found = parallel.initialize(model), []
    for layers in (2, 4):
        config = copy.deepcopy(load_hf_config(path))
        config.num_hidden_layers = layers
        (chunk,) = build_model(config, model, groups, **overrides)
        for parameter in chunk.parameters():
            torch.nn.init.normal_(parameter, std=0.1)  # a router of memory's leftovers would choose one expert for all
        own = {p.untyped_storage().data_ptr() for p in chunk.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = tensor
            return tensor

        tokens = torch.arange(2 * length).view(2, length) % 131
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chunk(tokens, torch.arange(length).expand(2, length), None)
        found.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    return found[1] - found[0]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(dtype, recompute, tp, folder):
    model = layout(tp=tp, dtype=dtype, recompute=recompute, sequence_parallel=tp > 1)
    length = 64
    expected = 2 * 2 * length * layer_activations(load_hf_config(folder / "llama"), model, length, False)
    for found in run_distributed(saved_bytes_rank, tp, folder / "llama", model, length):
        assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [layout(), *EXPERT_LAYOUTS], ids=str)
def test_activations_of_experts_are_what_autograd_keeps(model, dtype, folder):
    model = replace(model, dtype=dtype, sequence_parallel=model.tensor_model_parallel_size > 1)
    ranks, length = model.tensor_model_parallel_size * model.expert_model_parallel_size, 64
    expected = 2 * 2 * length * layer_activations(load_hf_config(folder / "mixtral"), model, length, False, sparse=True)
    # Some experts are chosen more often than others: the mean over all ranks is that of an even choice.
    found = run_distributed(saved_bytes_rank, ranks, folder / "mixtral", model, length)
    assert sum(found) / ranks == pytest.approx(expected, rel=0.1)


def without_mlps_rank(path, model, length):
    from megatron_tropd.models.build import recompute_fields

    return saved_bytes_rank(path, model, length, **recompute_fields("selective", fused=True))


def test_a_recomputed_mlp_keeps_its_input_alone(folder):
    """Of local layers, whose norms are never part of the MLP: what stays is what layers without an MLP keep."""
    length, hf_config, model = 64, load_hf_config(folder / "llama"), layout(dtype="bfloat16")
    (kept,) = run_distributed(without_mlps_rank, 1, folder / "llama", model, length)
    narrow = copy.deepcopy(hf_config)
    narrow.intermediate_size = 0
    assert kept == pytest.approx(2 * 2 * length * layer_activations(narrow, model, length, False), rel=0.1)
    # Of fused layers the norm before goes, too.
    selective = layer_activations(hf_config, replace(model, recompute="selective"), length, True)
    assert selective == layer_activations(narrow, model, length, True) - 2 * hf_config.hidden_size
