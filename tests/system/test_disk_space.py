"""A disk that is too small is foreseen; one that fills up is named, and what was whole before stays."""

import contextlib
import resource
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest
from support.helpers import run_distributed
from support.single_runs import refused, run, snapshot
from support.train_runs import overrides_of, records, refused_rank

from megatron_tropd.errors import UserError
from megatron_tropd.system.disk_space import check_checkpoints, check_room, folder_bytes, show


@contextlib.contextmanager
def small_disk(size: str):
    """Yield a folder on a separate disk."""
    with tempfile.TemporaryDirectory() as folder:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True
        )
        if mounted.returncode:
            pytest.skip(f"this machine lets no test mount a disk: {mounted.stderr.strip()}")
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("options", [[], ["student.dtype=bfloat16", "training.use_distributed_optimizer=false"]])
def test_the_estimate_is_what_a_checkpoint_takes(options, material, tmp_path):
    run(material, tmp_path / "run", *options, "training.steps=1")
    taken = folder_bytes(tmp_path / "run" / "checkpoints" / "step_000001")
    (estimate,) = run_distributed(size_rank, 1, overrides_of(material, tmp_path / "other", *options))
    assert 0.97 * taken < estimate < 1.05 * taken + (1 << 20)


def size_rank(overrides):
    from megatron_tropd import load_recipe
    from megatron_tropd.parallel.groups import initialize
    from megatron_tropd.training import checkpoint
    from megatron_tropd.training.run import set_up

    recipe = load_recipe(None, overrides)
    return checkpoint.size_of(set_up(recipe, initialize(recipe.student)).student)


def test_field_cases_b16_a_disk_too_small_is_foreseen(material):
    with small_disk("1m") as disk:
        message = refused(material, disk / "run")
        assert str(disk / "run" / "checkpoints") in message
        assert "free" in message
        assert "checkpoint.keep" in message
        assert not (disk / "run" / "recipe.yaml").exists()
        assert not (disk / "run" / "metrics.jsonl").exists()


def fill_up_rank(overrides, disk):
    """Train; after the first checkpoint another program fills the disk, except for 300 kB."""
    import shutil

    from megatron_tropd.training import checkpoint

    save = checkpoint.save

    def save_and_fill(*arguments):
        path = save(*arguments)
        if path.name == "step_000002":
            (disk / "others").write_bytes(b"0" * (shutil.disk_usage(disk).free - 300_000))
        return path

    checkpoint.save = save_and_fill
    return refused_rank(overrides)


def test_field_cases_b16_a_disk_that_fills_up_costs_one_checkpoint_and_the_run_continues(material, tmp_path):
    options = ["checkpoint.save_interval=2"]
    with small_disk("40m") as disk:
        (message,) = run_distributed(fill_up_rank, 1, overrides_of(material, disk / "run", *options), disk)
        checkpoints = disk / "run" / "checkpoints"
        assert str(checkpoints / "step_000004") in message
        assert "free" in message
        assert "takes about" in message
        assert [p.name for p in checkpoints.iterdir()] == ["step_000002"]
        (disk / "others").unlink()
        assert run(material, disk / "run", *options)["steps"] == 4
        assert [r["step"] for r in records(disk / "run")] == [0, 1, 2, 3]


def limited_rank(overrides, size):
    """Train where no file may grow beyond `size`, as under a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return refused_rank(overrides)


def test_field_cases_b16_a_limit_on_files_is_named_too(material, tmp_path):
    """Stands in where no disk can be mounted."""
    run(material, tmp_path, "training.exit_step=1")
    before = snapshot(tmp_path / "checkpoints")
    (message,) = run_distributed(limited_rank, 1, overrides_of(material, tmp_path), 60_000)
    assert f"no room for {tmp_path / 'checkpoints' / 'step_000004'}" in message
    assert snapshot(tmp_path / "checkpoints") == before
    assert run(material, tmp_path)["steps"] == 4


def convert_limited(hf_path, output, size):
    from megatron_tropd.models.convert import convert_hf_to_mcore

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    with pytest.raises(UserError) as error:
        convert_hf_to_mcore(hf_path, output)
    return str(error.value)


def test_field_cases_b16_a_conversion_without_room_leaves_nothing(material, tmp_path):
    output = tmp_path / "converted"
    (message,) = run_distributed(convert_limited, 1, str(material / "student"), str(output), 60_000)
    assert f"no room for {output}" in message
    assert list(tmp_path.iterdir()) == []
    with small_disk("100k") as disk:
        (message,) = run_distributed(convert_limited, 1, str(material / "student"), str(disk / "converted"), 1 << 30)
        assert f"{disk} has" in message
        assert list(disk.iterdir()) == []


def test_what_is_asked_of_a_disk(tmp_path, monkeypatch, caplog):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2500}))
    check_room(tmp_path / "not" / "yet", 2500, "it", "do")
    with pytest.raises(UserError, match=r"has 2.5 kB free, and it takes 2.5 kB; do"):
        check_room(tmp_path, 2501, "it", "do")
    existing = [tmp_path / "step"]
    existing[0].mkdir()
    (existing[0] / "file").write_bytes(b"0" * 1000)
    check_checkpoints(tmp_path, existing, 1000, keep=2, saves=9)  # two more, then the first one goes
    check_checkpoints(tmp_path, [], 1000, keep=1, saves=9)
    with pytest.raises(UserError, match="up to 3 of them"):
        check_checkpoints(tmp_path, [], 1000, keep=2, saves=9)
    check_checkpoints(tmp_path, [], 1000, keep=2, saves=2)
    check_checkpoints(tmp_path, [], 1000, keep=0, saves=9)
    assert "will not all fit" in caplog.text
    check_checkpoints(tmp_path, [], 9000, keep=2, saves=0)


def test_bytes_in_words():
    assert [show(n) for n in (0, 999, 1000, 141_000_000_000, 2_000_000_000_000)] == [
        *("0 bytes", "999 bytes", "1 kB", "141 GB", "2e+03 GB")
    ]
