#!/usr/bin/env python
"""Convert a Hugging Face folder to a Megatron distributed checkpoint that loads under every TP and PP.

python tools/convert_hf_to_mcore.py --hf-path MODEL --output CHECKPOINT --verify
torchrun --nproc-per-node 8 tools/convert_hf_to_mcore.py --tensor-model-parallel-size 8 --hf-path M --output C
"""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-mcore", *sys.argv[1:]]))
