"""The oldest transformers that is allowed, and the last of version 4, convert and verify as the installed one does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# With the tokenizers and the hub's client that each asks for; the rest of the environment is the installed one.
RELEASES = {
    "4.51.3": ("tokenizers>=0.21,<0.22", "huggingface-hub>=0.34,<1.0"),
    "4.57.6": ("tokenizers>=0.22,<0.23", "huggingface-hub>=0.34,<1.0"),
}
ROOT = Path(__file__).parents[2]
FILES = {
    "huggingface": ("test_hf_config", "test_hf_checks", "test_tensor_dtypes"),
    "models": ("test_verify", "test_convert", "test_model"),
}
CACHE = Path(tempfile.gettempdir(), f"megatron_tropd_transformers_py{sys.version_info[0]}{sys.version_info[1]}")


def _installed(version):
    """A folder with that release, downloaded once for a machine."""
    folder = CACHE / version
    if not (folder / "complete").exists():
        packages = (f"transformers=={version}", *RELEASES[version])
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--target", str(folder)]
        result = subprocess.run([*command, *packages], capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"pip cannot get transformers {version}: {result.stderr.strip().splitlines()[-1]}")
        (folder / "complete").write_text("")
    return folder


@pytest.mark.full
@pytest.mark.parametrize("version", RELEASES)
def test_field_cases_b12_conversions_under(version):
    environment = {**os.environ, "PYTHONPATH": str(_installed(version)), "OMP_NUM_THREADS": "1"}
    which = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    assert subprocess.run(which, env=environment, capture_output=True, text=True).stdout.strip() == version
    files = [f"tests/{folder}/{name}.py" for folder, names in FILES.items() for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
