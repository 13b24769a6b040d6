#!/usr/bin/env python
"""Export a Megatron checkpoint to a Hugging Face folder that transformers loads.

python tools/convert_mcore_to_hf.py --checkpoint runs/x/checkpoints/step_000200 --output EXPORT
python tools/convert_mcore_to_hf.py --checkpoint CHECKPOINT --output EXPORT --dtype bfloat16
"""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "mcore-to-hf", *sys.argv[1:]]))
