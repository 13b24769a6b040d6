"""Whole logits of a model under any layout, and their distance from transformers': for checks, never for training."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tropd.errors import UserError
from megatron_tropd.hf_weights import SafetensorsFolder
from megatron_tropd.host_memory import available_host_bytes
from megatron_tropd.megatron_compat import run_schedule
from megatron_tropd.model import load_hf_config
from megatron_tropd.output_hook import OutputHook
from megatron_tropd.parallel import ParallelGroups, all_shards

_ROWS, _LENGTH = 2, 24
_HEADROOM = 1.1  # of the device's memory over the weights: activations of a few tokens, and fragments


def full_logits(
    chunks: list[torch.nn.Module], tokens: torch.Tensor, groups: ParallelGroups, vocab_size: int
) -> torch.Tensor | None:
    """Return the logits [b, s, vocab_size] of `tokens` [b, s] on the last stage, None on the others; collective."""
    kept: list[torch.Tensor] = []
    hook = OutputHook(chunks)

    def keep(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [s, b, V/tp]
        kept.append(torch.cat(all_shards(logits, groups.tp), dim=-1)[..., :vocab_size].transpose(0, 1).contiguous())
        return logits[..., :1]

    def forward_step(data_iterator, model):
        rows = next(data_iterator)
        position_ids = torch.arange(rows.size(1), device=rows.device).expand_as(rows)
        with hook.armed(keep):
            output = model(rows, position_ids, None)
        return output, lambda output, non_loss_data=True: None

    microbatches = [tokens] * groups.micro_batch_multiple
    rows, length = tokens.shape
    try:
        with torch.no_grad():
            run_schedule(
                groups, forward_step, microbatches, chunks, length, rows, forward_only=True, collect_non_loss_data=True
            )
    finally:
        hook.remove()
    return kept[0] if kept else None


def logit_difference(chunks: list[torch.nn.Module], hf_path: str | Path, groups: ParallelGroups) -> float:
    """Return the largest absolute difference between fp32 chunks' logits and transformers' in fp32.

    Over random token ids; collective, the same number on every rank. On CUDA the chunks must be of Megatron's local
    layers: Transformer Engine multiplies fp32 matrices with the 10-bit mantissas of TF32.
    """
    hf_config = load_hf_config(hf_path)
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, hf_config.max_position_embeddings)
    tokens = torch.randint(hf_config.vocab_size, (_ROWS, length), generator=generator).to(groups.device)
    difference = torch.zeros(1, dtype=torch.float64, device=groups.device)
    with _whole_float32():
        ours = full_logits(chunks, tokens, groups, hf_config.vocab_size)
        if groups.is_reporter:
            theirs = _transformers_logits(hf_path, tokens)
            difference[0] = (ours.double() - theirs.to(ours.device)).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Within the context torch does not shorten fp32 factors to TF32, which some containers make its default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_host_memory(hf_path: str | Path, groups: ParallelGroups) -> None:
    """Refuse a comparison for which the host memory does not suffice, before anything is loaded; collective.

    The rank that compares loads the whole model in fp32 with transformers. Without CUDA the ranks of its host hold
    their parts of Megatron's model there, too.

    Raises:
        UserError: on every rank, with the memory needed and available.
    """
    needed = transformers_bytes(hf_path)
    if groups.device.type == "cpu":
        needed += needed * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) // groups.mp.size()
    available = torch.zeros(1, dtype=torch.float64, device=groups.device)
    if groups.is_reporter:
        available[0] = available_host_bytes()
    dist.all_reduce(available, op=dist.ReduceOp.MAX)
    if needed > available.item():
        raise UserError(
            f"{hf_path}: --verify needs {needed / 1e9:.1f} GB of host memory, for the whole model in fp32, and "
            f"{available.item() / 1e9:.1f} GB are available. Convert on a machine with more, or without --verify "
            "and verify a smaller model of the same architecture."
        )


def transformers_bytes(hf_path: str | Path) -> int:
    """Return the size of a Hugging Face model's weights in fp32."""
    with SafetensorsFolder(hf_path) as folder:
        return 4 * folder.num_elements()


def _transformers_logits(hf_path: str | Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return transformers' logits [b, s, v], computed on the CPU where the model does not fit beside Megatron's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(hf_path), dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    device = tokens.device
    if device.type == "cuda" and transformers_bytes(hf_path) * _HEADROOM > torch.cuda.mem_get_info(device)[0]:
        device = torch.device("cpu")
    with torch.no_grad():
        return model.to(device).eval()(tokens.to(device)).logits.double()
