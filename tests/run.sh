#!/usr/bin/env bash
# Lint and the whole test suite, on a fresh machine or a ready one; arguments go to pytest.
#
#   bash tests/run.sh
#   bash tests/run.sh tests/test_config.py -k unknown
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETUP_MODULES="pytest pytest_timeout hypothesis ruff" source examples/setup_env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the distributed tests run several processes side by side
python -m ruff check .
python -m ruff format --check .
python -m pytest -q "$@"
