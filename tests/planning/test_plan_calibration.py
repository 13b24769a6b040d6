"""The calibration file: what the doctor writes is read, what is missing keeps its default, what is wrong is named."""

import json
import re

import pytest
from support.helpers import run_distributed
from transformers import LlamaConfig

from megatron_tropd.cli import main
from megatron_tropd.doctor.calibrate import _LARGE_BYTES, calibrate
from megatron_tropd.errors import UserError
from megatron_tropd.machine.environment import gather
from megatron_tropd.planning.accelerator import Accelerator
from megatron_tropd.planning.calibration import load_accelerator


def _calibrate(path):
    return calibrate(str(path), gather(), {"torch": "2.9.0"}).status


def test_what_the_doctor_measures_is_what_the_plan_reads(tmp_path):
    assert run_distributed(_calibrate, 2, tmp_path / "cpu.json") == ["ok", "ok"]
    content = json.loads((tmp_path / "cpu.json").read_text())
    gpu = load_accelerator(tmp_path / "cpu.json")
    assert gpu.flops == content["flops"] > 0
    assert gpu.bandwidth == content["bandwidth"] > 0
    assert gpu.all_reduce_seconds == {2: content["all_reduce_seconds"]["2"]}
    size = _LARGE_BYTES["cpu"]
    assert gpu.all_reduce(size, 2) == pytest.approx(size / content["all_reduce_bandwidth"]["2"])
    assert content["memory_gb"] is content["layer_seconds_graphed"] is None  # of a GPU
    assert gpu.memory_gb == Accelerator().memory_gb
    assert gpu.layer_seconds_graphed == Accelerator().layer_seconds_graphed


def test_what_was_not_measured_keeps_its_default(tmp_path):
    (tmp_path / "some.json").write_text('{"flops": 5e14, "context_gb": null, "name": null}')
    assert load_accelerator(tmp_path / "some.json") == Accelerator(flops=5e14)
    (tmp_path / "empty.json").write_text('{"all_reduce_seconds": {}}')  # of a machine with one GPU
    assert load_accelerator(tmp_path / "empty.json") == Accelerator()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds a list, expected an object"),
        ('{"flop": 1.0}', "unknown key 'flop', expected name, date"),
        ('{"flops": 0}', "flops=0, expected a number above 0"),
        ('{"bandwidth": "fast"}', "bandwidth='fast', expected a number above 0"),
        ('{"memory_gb": true}', "memory_gb=True, expected a number above 0"),
        ('{"context_gb": NaN}', "context_gb=nan, expected a number above 0"),
        ('{"all_reduce_seconds": 1.0}', "all_reduce_seconds=1.0, expected numbers by ranks"),
        ('{"all_reduce_seconds": {"1": 1.0}}', "all_reduce_seconds names '1' ranks"),
        ('{"all_reduce_bandwidth": {"8": -1}}', "all_reduce_bandwidth.8=-1, expected a number above 0"),
    ],
)
def test_a_mistake_is_named_with_its_file_and_key(content, said, tmp_path):
    (tmp_path / "gpu.json").write_text(content)
    with pytest.raises(UserError) as refused:
        load_accelerator(tmp_path / "gpu.json")
    assert said in str(refused.value)
    assert str(tmp_path / "gpu.json") in str(refused.value)


def test_plan_takes_a_file_and_the_option_goes_before_it(tmp_path, capsys):
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "num_key_value_heads": 4}
    for role in ("student", "teacher"):
        LlamaConfig(num_hidden_layers=2, vocab_size=512, **sizes).save_pretrained(tmp_path / role)
    command = ["plan", *(f"{role}.hf_path={tmp_path / role}" for role in ("student", "teacher")), "--gpus", "1"]
    (tmp_path / "gpu.json").write_text('{"memory_gb": 24.0, "context_gb": 0.75}')
    calibration = ["--calibration", str(tmp_path / "gpu.json")]
    assert main([*command, *calibration]) == 0
    text = capsys.readouterr().out
    assert "of 23 (24 less 1): fits" in text
    assert re.search(r"CUDA context +0\.750", text)
    assert main([*command, *calibration, "--gpu-memory", "1.5"]) == 1
    assert "(2 less 1): DOES NOT FIT" in capsys.readouterr().out
    assert main([*command, "--calibration", str(tmp_path / "none.json")]) == 2
    assert "none.json cannot be read" in capsys.readouterr().err


def test_latencies_lie_between_and_beyond_those_measured():
    gpu = Accelerator(all_reduce_seconds={2: 10e-6, 8: 30e-6})
    assert gpu.latency(1) == 0
    assert gpu.latency(2) == pytest.approx(10e-6)
    assert gpu.latency(4) == pytest.approx(20e-6)
    assert gpu.latency(8) == pytest.approx(30e-6)
    assert gpu.latency(16) == pytest.approx(40e-6)
    assert Accelerator(all_reduce_seconds={8: 30e-6}).latency(2) == pytest.approx(15e-6)


def test_large_messages_take_the_bandwidth_measured_or_that_of_the_links():
    gpu = Accelerator(all_reduce_bandwidth={8: 2e11})
    assert gpu.all_reduce(1e9, 1) == 0
    assert gpu.all_reduce(1e9, 8) == pytest.approx(1e9 / 2e11)
    assert gpu.all_reduce(1e9, 2) == pytest.approx(1e9 / (2e11 * 7 / 4))  # a ring of 2 sends each byte once, not 7/4
    assert gpu.all_reduce(1e9, 16, spans_nodes=True) == pytest.approx(1e9 * 30 / 16 / gpu.network_bandwidth)
    assert Accelerator().all_reduce(1e9, 4) == pytest.approx(1e9 * 1.5 / 360e9)
