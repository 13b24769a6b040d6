"""What a process runs on: real packages, packages that are hidden or broken, and which versions fit."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.hidden_packages import HIDE

from megatron_tropd.machine.environment import REQUIREMENTS, Environment, Package, gather, misfit, remedy

# Run in a separate process: what imports depends on what was imported before.
SHOW = """
import json
from megatron_tropd.machine.environment import gather
print(json.dumps({name: [p.version, p.problem] for name, p in gather().packages.items()}))
"""


def packages(prelude="", path=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    command = [sys.executable, "-c", prelude + SHOW]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(shown.stdout.splitlines()[-1])


def test_this_process():
    import torch

    found = gather()
    assert found.package("torch").version == torch.__version__
    assert found.has_cuda == torch.cuda.is_available()
    assert len(found.gpus) == torch.cuda.device_count()
    for rule in REQUIREMENTS:
        if rule.required:
            assert found.fits(rule.name), rule.name


@pytest.mark.parametrize("prelude", ["import sys; sys.modules['triton'] = None\n", HIDE.format(names={"triton"})])
def test_a_hidden_package_does_not_import_and_says_why(prelude):
    version, problem = packages(prelude)["Triton"]
    assert version is None or problem == "its module triton cannot be found"
    assert importlib.util.find_spec("triton") is None or gather().package("Triton").importable


def test_broken_and_counterfeit_packages_keep_the_reason(tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise OSError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')\n")
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    found = packages(path=tmp_path)
    assert found["flash-attn"][1] == (
        "`import flash_attn` fails (OSError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10)"
    )
    assert "No module named 'apex.optimizers'; is it PyPI's unrelated package of that name?" in found["Apex"][1]


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("torch", "2.5.1+cu124", "expected at least 2.6"),
        ("torch", "2.6.0", None),
        ("torch", "2.9.0a0+git123", None),  # a container's
        ("megatron-core", "0.15.3", "expected at least 0.16"),
        ("megatron-core", "0.20.0rc0", "expected below 0.20"),
        ("megatron-core", "0.19.2", None),
        ("flash-attn", "2.7.2.post1", "expected at least 2.7.3"),
        ("flash-attn", "2.8.3", None),
        ("flash-attn", "private build", None),
    ],
)
def test_versions_that_fit(name, version, expected):
    assert misfit(name, version) == expected


@pytest.mark.parametrize(
    ("megatron", "cuda", "expected"),
    [
        ("0.16.1", "12.8", "'transformer-engine[core_cu12,pytorch]>=2.9,<2.12'"),
        ("0.19.2", "13.0", "'transformer-engine[core_cu13,pytorch]>=2.9'"),
    ],
)
def test_transformer_engine_is_named_as_this_megatron_declares_it(megatron, cuda, expected):
    environment = Environment("3.12.1", {"megatron-core": Package(megatron)}, cuda=cuda)
    assert remedy("Transformer Engine", environment) == f"pip install --no-build-isolation {expected}"


def test_the_table_agrees_with_what_the_package_declares():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for rule in REQUIREMENTS:
        if rule.required:
            declared = f'"{rule.distributions[0]}>={rule.least}' + (f',<{rule.below}"' if rule.below else '"')
            assert declared in text
