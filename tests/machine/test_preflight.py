"""What a recipe needs of a machine: each refusal in one line with its remedy, before a weight is read."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megatron_tropd.training.run  # noqa: F401  (Megatron's engines cannot be imported first while pytest captures stderr)
from megatron_tropd.cli import main
from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.machine.environment import Environment, Gpu, Package
from megatron_tropd.machine.preflight import check, problems

ROOT = Path(__file__).parents[2]
H100 = Gpu("NVIDIA H100 80GB HBM3", 85.0, (9, 0))
V100 = Gpu("Tesla V100-SXM2-32GB", 34.0, (7, 0))
PACKAGES = {
    "torch": Package("2.9.0+cu128"),
    "megatron-core": Package("0.16.1"),
    "transformers": Package("4.57.0"),
    "Transformer Engine": Package("2.11.0"),
    "flash-attn": Package("2.8.3"),
    "Triton": Package("3.5.0"),
}


def machine(gpus=8, gpu=H100, processes=None, variables=None, **packages):
    """Eight H100s with everything installed, less what is said."""
    found = {**PACKAGES, **{name.replace("_", "-"): package for name, package in packages.items()}}
    return Environment(
        "3.12.1",
        found,
        gpus=(gpu,) * gpus,
        has_cuda=gpus > 0,
        cuda="12.8",
        nccl="2.27.5",
        world_size=processes or max(gpus, 1),
        local_world_size=processes or max(gpus, 1),
        variables=variables or {},
    )


def recipe(**keys):
    made = Recipe()
    for key, value in keys.items():
        section, name = key.split("__")
        setattr(getattr(made, section), name, value)
    return made


def without(name):
    return dataclasses.replace(machine(), packages={k: v for k, v in PACKAGES.items() if k != name})


TE_BROKEN = {"Transformer Engine": Package("2.11.0", "`import transformer_engine.pytorch` fails (OSError: libcudnn)")}
REFUSALS = {
    "flash-attn missing": (
        {"rollout__attention": "flash"},
        without("flash-attn"),
        ("rollout.attention=flash needs flash-attn 2.7.3 or later, and it is not installed", "pip install", "auto"),
    ),
    "flash-attn old": (
        {"rollout__attention": "flash"},
        machine(flash_attn=Package("2.6.3")),
        ("version 2.6.3 is installed", "flash-attn>=2.7.3"),
    ),
    "flash-attn broken": (
        {"rollout__attention": "flash"},
        machine(flash_attn=Package("2.8.3", "`import flash_attn` fails (ImportError: undefined symbol)")),
        ("undefined symbol",),
    ),
    "flash-attn in float32": (
        {"rollout__attention": "flash", "student__dtype": "float32"},
        machine(),
        ("rollout.attention=flash contradicts student.dtype=float32", "student.dtype=bfloat16", "attention=auto"),
    ),
    "flash-attn on a CPU": ({"rollout__attention": "flash"}, machine(gpus=0), ("needs a CUDA device",)),
    "flash-attn on a V100": (
        {"rollout__attention": "flash", "student__dtype": "float16", "teacher__dtype": "float16"},
        machine(gpu=V100),
        ("compute capability 8.0 or later, and a Tesla V100-SXM2-32GB has 7.0",),
    ),
    "triton missing": ({"objective__kernel": "triton"}, without("Triton"), ("objective.kernel=triton", "auto")),
    "triton on a CPU": ({"objective__kernel": "triton"}, machine(gpus=0), ("needs a CUDA device", "auto")),
    "too many processes": (
        {},
        machine(gpus=1, processes=2),
        ("2 processes on this node and 1 GPU:", "--nproc-per-node 1", "export CUDA_VISIBLE_DEVICES= to run on the CPU"),
    ),
    "student's TP beyond a node": (
        {"student__tensor_model_parallel_size": 16},
        machine(),
        ("student.tensor_model_parallel_size=16 is more than the 8 GPUs of a node", "1 or 2 or 4 or 8", "pipeline"),
    ),
    "teacher's TP beyond a node": (
        {"teacher__tensor_model_parallel_size": 3},
        machine(gpus=2),
        ("teacher.tensor_model_parallel_size=3 is more than the 2 GPUs of a node", "set it to 1,"),
    ),
    "fp8 without Transformer Engine": (
        {"student__fp8": "hybrid"},
        without("Transformer Engine"),
        ("student.fp8=hybrid needs a CUDA device and Transformer Engine",),
    ),
    "mxfp8 on an H100": (
        {"teacher__fp8": "e4m3", "teacher__fp8_recipe": "mxfp8"},
        machine(),
        ("teacher.fp8_recipe=mxfp8 needs GPUs of compute capability 10.0 or later", "9.0"),
    ),
    "bfloat16 on a V100": (
        {"teacher__dtype": "float16"},
        machine(gpu=V100),
        ("student.dtype=bfloat16 needs GPUs of compute capability 8.0", "float16 or float32"),
    ),
    "auto, which is bfloat16, on a V100": (
        {"student__dtype": "auto", "teacher__dtype": "float16"},
        machine(gpu=V100),
        ("student.dtype=auto needs GPUs of compute capability 8.0", "float16 or float32"),
    ),
    "static engine with context parallelism": (
        {"rollout__engine": "static", "student__context_parallel_size": 2},
        machine(),
        ("rollout.engine=static contradicts student.context_parallel_size=2", "rollout.engine=dynamic"),
    ),
    "an attention switched off": (
        {},
        machine(variables={"NVTE_FLASH_ATTN": "0"}),
        ("NVTE_FLASH_ATTN=0", "unset NVTE_FLASH_ATTN"),
    ),
    "a broken Transformer Engine": (
        {},
        dataclasses.replace(machine(), packages={**PACKAGES, **TE_BROKEN}),
        ("Transformer Engine 2.11.0 is installed and", "libcudnn", "<2.12", "pip uninstall transformer-engine"),
    ),
    "torch too old": ({}, machine(torch=Package("2.5.1+cu124")), ("torch 2.5.1", "at least 2.6", "pip install")),
    "no megatron-core": ({}, without("megatron-core"), ("megatron-core is needed by everything",)),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_is_one_line_with_its_remedy(name):
    keys, environment, parts = REFUSALS[name]
    (problem,) = problems(recipe(**keys), environment)
    assert "\n" not in problem
    assert problem.endswith(".")
    for part in parts:
        assert part in problem, problem
    with pytest.raises(UserError, match="."):
        check(recipe(**keys), environment)


ACCEPTED = {
    "the defaults on eight H100s": ({}, machine()),
    "flash-attn where it can run": ({"rollout__attention": "flash"}, machine()),
    "Hopper's flash-attn alone": (
        {"rollout__attention": "flash"},
        dataclasses.replace(without("flash-attn"), packages={**PACKAGES, "flash-attn 3": Package("3.0.0")}),
    ),
    "float32 where attention falls back": (
        {"student__dtype": "float32", "teacher__dtype": "float32"},
        without("flash-attn"),
    ),
    "flash-attn in what auto is on GPUs": (
        {"rollout__attention": "flash", "student__dtype": "auto", "teacher__dtype": "auto"},
        machine(),
    ),
    "a student in float16": ({"student__dtype": "float16"}, machine()),
    "a bare CPU": ({"student__tensor_model_parallel_size": 4}, machine(gpus=0, processes=4)),
    "attentions switched off without Transformer Engine": (
        {},
        dataclasses.replace(without("Transformer Engine"), variables={"NVTE_FLASH_ATTN": "0"}),
    ),
    "the static engine with context parallelism in plain attention": (
        {"rollout__engine": "static", "student__context_parallel_size": 2},
        without("Transformer Engine"),
    ),
    "Triton's interpreter": (
        {"objective__kernel": "triton"},
        machine(gpus=0, variables={"TRITON_INTERPRET": "1"}),
    ),
    "tensorwise fp8 on an H100": ({"student__fp8": "hybrid"}, machine()),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_can_run_is_let_through(name):
    keys, environment = ACCEPTED[name]
    assert problems(recipe(**keys), environment) == []


def test_generation_is_asked_for_its_own_model_alone():
    keys = {"teacher__tensor_model_parallel_size": 16, "objective__kernel": "triton"}
    assert problems(recipe(**keys), without("Triton"), ("student",)) == []
    assert len(problems(recipe(**keys), without("Triton"), ("teacher",))) == 1
    assert len(problems(recipe(**keys), without("Triton"))) == 2
    assert len(problems(recipe(**keys, objective__name="sft"), without("Triton"))) == 1  # it has no teacher


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "tiny", "student.hf_path=nowhere"],
        ["generate", "--hf-path", "nowhere", "--prompts", "nowhere", "--output", "nowhere"],
        ["evaluate", "--hf-path", "nowhere", "--problems", "nowhere"],
    ],
)
def test_commands_refuse_before_they_open_anything(arguments, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*arguments, "rollout.attention=flash"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megatron-tropd: error: rollout.attention=flash needs ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_all_ranks_refuse_together_and_print_once():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_tropd"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    refused = subprocess.run(
        [*command, "train", "tiny", "student.fp8=hybrid", "student.dtype=bfloat16"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode != 0
    assert refused.stderr.count("student.fp8=hybrid needs a CUDA device and Transformer Engine") == 1
