"""training.deterministic: it reaches Megatron, torch and the environment, and contradictions are refused."""

import importlib
import os

import pytest
import torch
from support.helpers import run_distributed
from support.train_runs import overrides_of

from megatron_tropd.errors import UserError
from megatron_tropd.machine.determinism import make_deterministic

EXPECTED = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}


@pytest.fixture
def clean(monkeypatch):
    """No variable of the environment is set, and what is set is undone."""
    for name in EXPECTED:
        monkeypatch.setenv(name, "")  # remembered, so that it is undone
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def train_rank(overrides):
    """Train; return the settings that were active when the models were built."""
    from megatron_tropd import load_recipe

    loop = importlib.import_module("megatron_tropd.training.loop")
    set_up, runs = loop.set_up, []

    def keep(*arguments):
        runs.append({name: os.environ.get(name) for name in EXPECTED} | {"run": set_up(*arguments)})
        return runs[0]["run"]

    loop.set_up = keep
    loop.train(load_recipe(None, overrides))
    config = runs[0].pop("run").student.modules[0].config
    return runs[0], config.deterministic_mode, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("flag", [True, False])
def test_a_recipe_reaches_megatron_torch_and_the_environment(flag, material, tmp_path):
    overrides = overrides_of(material, tmp_path, "training.steps=1", f"training.deterministic={flag}")
    ((environment, megatron, algorithms),) = run_distributed(train_rank, 1, overrides)
    assert environment == (EXPECTED if flag else dict.fromkeys(EXPECTED))
    assert (megatron, algorithms) == (flag, flag)


def test_values_that_are_as_good_stay(clean):
    clean.setenv("NCCL_ALGO", "Tree")
    make_deterministic()
    assert {name: os.environ[name] for name in EXPECTED} == {**EXPECTED, "NCCL_ALGO": "Tree"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_contradicting_environment_is_refused(name, clean):
    clean.setenv(name, "1")
    with pytest.raises(UserError, match=rf"training\.deterministic=true and the environment's {name}=1 contradict"):
        make_deterministic()


def test_it_is_refused_once_cuda_has_started(clean):
    clean.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(UserError, match="before CUDA starts"):
        make_deterministic()
    for name, value in EXPECTED.items():
        clean.setenv(name, value)
    make_deterministic()
    assert torch.are_deterministic_algorithms_enabled()


def test_variables_are_set_before_training_looks_at_the_gpus(clean):
    """To ask for a GPU's properties starts CUDA, after which it is too late."""
    from megatron_tropd import load_recipe

    loop = importlib.import_module("megatron_tropd.training.loop")

    class Looked(Exception):
        pass

    def look():
        raise Looked({name: os.environ.get(name) for name in EXPECTED})

    clean.setattr(loop, "gather", look)
    with pytest.raises(Looked) as seen:
        loop.train(load_recipe("tiny", ["training.deterministic=true"]))
    assert seen.value.args[0] == EXPECTED
