#!/usr/bin/env bash
# Lint, types and the tests, on a fresh machine or a ready one; arguments after the tier go to pytest.
#
#   bash tests/run.sh            the normal tier: every feature, at most 12 minutes on two quiet cores, 25 on slow ones
#   bash tests/run.sh --pairs    and every pair of features that the parallel layouts of tests/parity contain
#   bash tests/run.sh --full     and all layouts, all ways to resume, kills: at most 25 minutes on two quiet cores
#   bash tests/run.sh --full tests/test_config.py -k unknown    of a file, too, only the tests of the tier run
#
# Everything runs on CPUs over gloo, and no GPU is visible to it: several processes in fp32 do not share one. On a machine
# with a GPU the kernels' tests then run once more on it, unless tests were named; `pytest tests/kernels` does only that.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETUP_MODULES="pytest pytest_timeout hypothesis ruff mypy math_verify" source examples/setup_env.sh
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # the distributed tests run several processes side by side

tier=()
case ${1:-} in
--pairs) tier=(-m "not full") ;;
--full) tier=(-m "") ;;
esac
((${#tier[@]} == 0)) || shift

python -m ruff check .
python -m ruff format --check .
python -m mypy
CUDA_VISIBLE_DEVICES="" python -m pytest -q "${tier[@]}" "$@"
if (($# == 0)) && python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  python -m pytest -q "${tier[@]}" tests/kernels
fi
