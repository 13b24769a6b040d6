#!/usr/bin/env bash
# Measure on one GPU what no CPU can tell, within nine minutes: everything as JSON and one table in OUTPUT_FOLDER.
#
#   bash tests/gpu/run.sh runs/gpu                          # all stages
#   bash tests/gpu/run.sh runs/gpu --only eight_b decode    # some of them
#   bash tests/gpu/run.sh runs/gpu --small                  # small sizes, on a CPU too: a test of the script itself
#
# Needs a Python ($PYTHON, else python3) with the package's dependencies and pytest; the package itself need not be
# installed, and nothing is fetched.
set -euo pipefail
TESTS="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$TESTS${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu.run "$@"
