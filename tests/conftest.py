"""For all tests: Hypothesis without time limits, Triton's interpreter without a GPU, models and runs to share."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before any test file imports triton

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
pytest.register_assert_rewrite("support")  # what is asserted there shows its values, too


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory):
    """A short real run with problems and held-out text; tests must not write into its folder."""
    from support.report_runs import train_short_run, write_material

    material = write_material(tmp_path_factory.mktemp("material"))
    return train_short_run(material, tmp_path_factory.mktemp("runs") / "real")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A student, a teacher, prompts with the teacher's responses and problems."""
    from support.tiny_models import write_model

    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "student", "llama_tied", seed=1)
    write_model(folder / "teacher", "llama", seed=2, hidden_size=64)
    write_model(folder / "experts", "mixtral", seed=1)
    without_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder / "teacher", folder / "unweighed", ignore=without_weights)
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(7):
            prompt = {"id": f"p{i}", "messages": [{"role": "user", "content": f"add {i} and {3 * i}"}]}
            file.write(json.dumps({**prompt, "answer": str(4 * i), "teacher_response": f"it is {4 * i} {'!' * i}"}))
            file.write("\n")
    return folder


@pytest.fixture(scope="module")
def single(material, tmp_path_factory):
    """The records of one process, against which every layout is held."""
    from support.helpers import run_distributed
    from support.train_runs import overrides_of, records, train_rank

    run = tmp_path_factory.mktemp("single")
    run_distributed(train_rank, 1, overrides_of(material, run))
    return records(run)
