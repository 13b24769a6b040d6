"""Whole logits of a model under any layout, and their distance from transformers': for checks, never for training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tropd.megatron_compat import run_schedule
from megatron_tropd.model import load_hf_config
from megatron_tropd.output_hook import OutputHook
from megatron_tropd.parallel import ParallelGroups, all_shards

_ROWS, _LENGTH = 2, 24


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

    Over random token ids; collective, the same number on every rank.
    """
    hf_config = load_hf_config(hf_path)
    generator = torch.Generator().manual_seed(0)
    length = min(_LENGTH, hf_config.max_position_embeddings)
    tokens = torch.randint(hf_config.vocab_size, (_ROWS, length), generator=generator).to(groups.device)
    ours = full_logits(chunks, tokens, groups, hf_config.vocab_size)
    difference = torch.zeros(1, dtype=torch.float64, device=groups.device)
    if groups.is_last_stage and groups.tp_rank == 0:
        difference[0] = (ours.double() - _transformers_logits(hf_path, tokens)).abs().max()
    dist.all_reduce(difference, op=dist.ReduceOp.MAX)
    return difference.item()


def _transformers_logits(hf_path: str | Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        str(hf_path), dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.to(tokens.device).eval()(tokens).logits.double()
