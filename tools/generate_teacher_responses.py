#!/usr/bin/env python
"""Write the teacher's responses to a prompt file, {"id", "teacher_response"} a line, for `guidance.responses`.

    torchrun --nproc-per-node 8 tools/generate_teacher_responses.py RECIPE --output responses.jsonl [key=value ...]
    python tools/generate_teacher_responses.py --hf-path TEACHER --prompts prompts.jsonl --output responses.jsonl

Prompts that the output answers already are passed over, so the same command completes a killed run. Responses are
greedy unless --temperature is given; the other options are those of `megatron-tropd generate --help`.
"""

import sys

from megatron_tropd.cli import main

if __name__ == "__main__":
    defaults = ["generate", "--model", "teacher", "--field", "teacher_response", "--temperature", "0"]
    sys.exit(main([*defaults, *sys.argv[1:]]))
