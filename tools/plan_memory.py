#!/usr/bin/env python
"""Estimate a GPU's memory by part, and propose layouts that fit: `megatron-tropd plan` under the tools' roof.

python tools/plan_memory.py llama_70b_to_8b teacher.hf_path=70B student.hf_path=8B --gpus 8 --gpu-memory 80
"""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.exit(main(["plan", *sys.argv[1:]]))
