#!/usr/bin/env python
"""Measure a model's accuracy on problems with verifiable answers: `megatron-tropd evaluate` under the tools' roof.

python tools/evaluate.py --hf-path MODEL --problems problems.jsonl --output result.json
torchrun --nproc-per-node 2 tools/evaluate.py tiny --checkpoint runs/tiny/checkpoints/step_000080/model
"""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
