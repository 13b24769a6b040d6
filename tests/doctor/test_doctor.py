"""The doctor itself, alone and on two ranks: what it says where all is well, and each thing that may be wrong."""

import contextlib
import gc
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.helpers import PATIENCE, run_distributed
from support.hidden_packages import HIDE

from megatron_tropd import kernels
from megatron_tropd.doctor.kernels import CASES
from megatron_tropd.doctor.report import Check, from_exception, merge, verdict
from megatron_tropd.doctor.software import software_checks
from megatron_tropd.machine.environment import Environment, Gpu, Package, gather
from megatron_tropd.recipe import load_recipe

ROOT = Path(__file__).parents[2]
ROUNDS = "generate, score, update"
DONE = ["process groups", *(f"kernel {name}" for name in kernels.__all__), "small models", ROUNDS, "checkpoint"]
FAST = ["logging.dir=runs/doctor"]


def doctor_rank(overrides, breakage=None, calibration=None):
    """Run the doctor on this rank, perhaps with something broken; its status, its output, whether it left a file."""
    from megatron_tropd.doctor.run import run_doctor

    if breakage is not None:
        BREAKAGES[breakage]()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = run_doctor(load_recipe("tiny", overrides), "tiny", calibration=calibration)
    return status, output.getvalue().splitlines()


def break_kernel():
    """Let the chunked kernel, which runs on a CPU, say a little too much of every row."""
    from megatron_tropd.kernels.logprobs import chunked

    original = chunked.statistics
    chunked.statistics = lambda *args, **kwargs: original(*args, **kwargs) * 1.01


def break_gradient():
    from megatron_tropd.kernels.full_divergence import chunked

    original = chunked.write_gradient

    def write(out, *args, **kwargs):
        original(out, *args, **kwargs)
        out[3].zero_()

    chunked.write_gradient = write


def leak_contexts():
    """Keep the key/value caches of rollouts alive, as a reference too many would."""
    from megatron_tropd.mcore import engine_compat as compat

    original, alive = compat.DynamicInferenceContext.__init__, []

    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        alive.append(self.memory_buffer)

    compat.DynamicInferenceContext.__init__ = __init__


def drift_rollouts():
    """Let attention over the cache see half of each query: rollouts then are not those of the model that trains."""
    from megatron_tropd.mcore import paged_attention

    original = paged_attention.paged_decode_attention
    paged_attention.paged_decode_attention = lambda q, *args, **options: original(q * 0.5, *args, **options)


def lose_weights():
    """Let a checkpoint come back without its last digit."""
    from megatron_tropd.doctor import rounds as doctor_round

    original = doctor_round.load_checkpoint_weights

    def load(chunks, path):
        original(chunks, path)
        with torch.no_grad():
            next(chunks[0].parameters())[0, 0] += 1e-3

    doctor_round.load_checkpoint_weights = load


def stumble_on_rank_1():
    """Let rank 1 fail in the middle of a check, while rank 0 waits for it in a collective."""
    import megatron_tropd.doctor.agreement as agreement
    from megatron_tropd.kernels import sharding

    agreement._GRACE_SECONDS = 2.0
    if os.environ["RANK"] == "1":

        def fail(self, packed):
            raise RuntimeError("an illegal memory access was encountered")

        sharding.VocabShard.all_gather = fail


BREAKAGES = {
    "kernel": break_kernel,
    "gradient": break_gradient,
    "leak": leak_contexts,
    "drift": drift_rollouts,
    "checkpoint": lose_weights,
}


def lines_of(lines):
    """Status and whole line by check."""
    found = {}
    for line in lines[1:-1]:
        status, rest = line.split(maxsplit=1)
        name = next((name for name in DONE if rest.startswith(name)), rest.split("  ")[0])
        found[name] = (status, line)
    return found


@pytest.fixture(scope="module")
def alone():
    return run_distributed(doctor_rank, 1, FAST)[0]


def test_every_kernel_has_a_case():
    assert set(CASES) == set(kernels.__all__)


def test_alone_everything_that_is_needed_works(alone):
    status, lines = alone
    found = lines_of(lines)
    assert [found[name][0] for name in DONE] == ["ok"] * len(DONE), "\n".join(lines)
    assert status == 0
    assert lines[-1] == "all that is needed works"
    assert "TP=1 PP=1 CP=1; the recipe's TP=2 PP=1 CP=1 takes 2 processes, not 1" in found["process groups"][1]
    assert f"torch {torch.__version__}".split() == found["torch"][1].split()[1:]
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert not list(ROOT.glob(".doctor-*"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["student.sequence_parallel=true", "student.dtype=bfloat16", "objective.name=jsd", "objective.topk=4"],
        ["student.tensor_model_parallel_size=1", "student.pipeline_model_parallel_size=2", "rollout.engine=static"],
    ],
    ids=["tp2", "tp2_sequence_parallel_bfloat16_jsd", "pp2_static_teacher_tp2"],
)
def test_two_ranks_come_to_one_verdict(overrides):
    (status, lines), (other_status, other_lines) = run_distributed(doctor_rank, 2, [*FAST, *overrides])
    found = lines_of(lines)
    assert [found[name][0] for name in DONE] == ["ok"] * len(DONE), "\n".join(lines)
    assert found["all-reduce, world"][0] == found["same software on all ranks"][0] == "ok"
    assert (status, other_status, other_lines) == (0, 0, [])


def test_auto_is_resolved_before_anything_is_checked():
    overrides = ["student.dtype=auto", "teacher.dtype=auto"]
    (status, lines), _ = run_distributed(doctor_rank, 2, [*FAST, *overrides])
    assert status == 0, "\n".join(lines)
    found = lines_of(lines)
    said = re.search(r"student.dtype and teacher.dtype: auto is (\w+) on this CPU", found["dtype"][1])
    for name in ("kernel vocab_parallel_logprobs", ROUNDS):
        assert f" {said[1]}, " in found[name][1]


@pytest.mark.parametrize(
    ("breakage", "name", "message"),
    [
        ("kernel", "kernel vocab_parallel_logprobs", "differs from its float64 reference by"),
        ("gradient", "kernel full_divergence", "differs from its float64 reference by"),
        ("leak", ROUNDS, "memory grows by"),
        ("drift", ROUNDS, "log-probs of rollouts differ from training's by"),
        ("checkpoint", "checkpoint", "1 of 15 weights are not what was written"),
    ],
)
def test_what_is_broken_shows(breakage, name, message):
    status, lines = run_distributed(doctor_rank, 1, FAST, breakage)[0]
    kind, line = lines_of(lines)[name]
    assert (status, kind) == (1, "wrong"), "\n".join(lines)
    assert message in line
    assert name in lines[-1]


def stumbling_rank():
    """A process for the launcher's test below."""
    stumble_on_rank_1()
    from megatron_tropd.doctor.run import run_doctor

    return run_doctor(load_recipe("tiny"), "tiny")


def test_a_rank_that_stumbles_ends_all_ranks_and_is_named():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(Path(__file__))]
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode != 0  # gloo would wait for 30 minutes, longer than PATIENCE
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("wrong")]
    assert "rank 1: RuntimeError: an illegal memory access was encountered; ranks 0 still waited for it" in line
    assert "the checks after it were not made" in ended.stdout


@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ("triton", "missing Triton"),
        ("transformer_engine", "missing Transformer Engine"),
        ("flash_attn", "missing flash-attn"),
    ],
)
def test_a_hidden_library_is_missing_and_does_no_harm(hidden, line):
    call = "from megatron_tropd.cli import main\nsys.exit(main(['doctor', 'tiny', 'logging.dir=runs/doctor']))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", HIDE.format(names={hidden}) + call],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert [shown for shown in ran.stdout.splitlines() if shown.startswith((line, line.replace("missing", "wrong  ")))]
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("overrides", "hidden", "message"),
    [
        (["rollout.attention=flash"], "flash_attn", "rollout.attention=flash needs flash-attn 2.7.3 or later"),
        (["objective.kernel=triton"], "triton", "objective.kernel=triton needs Triton 3.2 or later"),
    ],
)
def test_what_a_recipe_needs_and_lacks_stops_it_before_anything_runs(overrides, hidden, message, tmp_path):
    arguments = ["doctor", "tiny", *overrides, "--json", str(tmp_path / "doctor.json")]
    call = f"from megatron_tropd.cli import main\nsys.exit(main({arguments!r}))\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HIDE.format(names={hidden}) + call]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert [line for line in ran.stdout.splitlines() if line.startswith("wrong   recipe") and message in line]
    assert "process groups" not in ran.stdout
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["status"] == 1
    assert any(message in check["detail"] for check in report["checks"] if check["status"] == "wrong")


def calibrate_rank(path):
    from megatron_tropd.doctor.calibrate import calibrate
    from megatron_tropd.machine.environment import gather

    return calibrate(path, gather(), {"torch": torch.__version__}).status


def test_a_calibration_measures_everything_that_is_there(tmp_path):
    path = tmp_path / "calibration.json"
    assert run_distributed(calibrate_rank, 2, str(path)) == ["ok", "ok"]
    measured = json.loads(path.read_text())
    keys = {"name", "date", "versions", "memory_gb", "context_gb", "flops", "bandwidth", "layer_seconds_eager"}
    assert set(measured) == keys | {"layer_seconds_graphed", "all_reduce_seconds", "all_reduce_bandwidth"}
    assert measured["flops"] > 1e8
    assert measured["bandwidth"] > 1e8
    layer = measured["layer_seconds_eager"]
    assert layer is None or 0 < layer < 10  # None: the deeper model took no longer, on a restless machine
    assert 0 < measured["all_reduce_seconds"]["2"] < 10
    assert measured["all_reduce_bandwidth"]["2"] > 1e5
    if not torch.cuda.is_available():
        assert measured["name"] == "CPU"
        assert measured["memory_gb"] is measured["context_gb"] is measured["layer_seconds_graphed"] is None


def test_hoppers_flash_attn_does_in_the_place_of_flash_attn():
    recipe = load_recipe("tiny", ["rollout.attention=flash"])
    names = ("torch", "megatron-core", "transformers")
    installed = {name: gather().package(name) for name in names}
    for third, fails in ((None, True), ("3.0.0", False)):
        packages = {**installed, "flash-attn 3": Package(third)}
        environment = Environment("3.12.1", packages, gpus=(Gpu("H100", 80.0, (9, 0)),), has_cuda=True, nccl="2.27")
        checks = {check.name: check for check in software_checks(recipe, environment)}
        assert checks["flash-attn"].fails == fails
        assert ("flash-attn 3" in checks) == (not fails)
        assert "flash-attn>=2.7.3" in checks["flash-attn"].remedy


def test_the_worst_of_the_ranks_counts_and_is_named():
    good, slow = Check("x", "ok", "fine"), Check("x", "slow", "lame")
    wrong = from_exception("x", RuntimeError("no\nmore"))
    assert merge([good, good]) == good
    assert merge([good, slow, slow]).detail == "rank 1: lame"
    assert merge([slow, good, wrong]).detail == "rank 2: RuntimeError: no"
    assert merge([good, wrong]).raised
    assert merge([wrong, wrong]) == wrong


def test_only_what_is_needed_fails():
    optional = [Check("Apex", "missing", needed=False), Check("flash-attn", "wrong", needed=False)]
    assert not any(check.fails for check in optional)
    assert verdict([*optional, Check("y", "slow")]) == "all that is needed works; slow: y"
    assert verdict([*optional, Check("fp8", "missing")]) == "1 of 3 checks failed: fp8"
    assert "(not needed by this recipe)" in optional[0].line()


def test_memory_counts_each_storage_once_while_it_lives():
    from megatron_tropd.doctor.rounds import memory_bytes

    device = torch.device("cpu")
    gc.collect()
    before = memory_bytes(device)
    held = torch.zeros(1 << 20)
    views = [held[:10], held.view(2, -1)]
    assert memory_bytes(device) - before == 4 << 20
    del held, views
    assert memory_bytes(device) == before


if __name__ == "__main__":
    sys.exit(stumbling_rank())
