"""Shares of sequences and attention over them: against whole sequences in float64, gradients too."""

import os
from dataclasses import dataclass

import pytest
import torch
from helpers import assert_close, run_distributed

from megatron_tropd.context_parallel import share_of


@dataclass
class Rows:
    values: torch.Tensor  # [b, s, 2]
    ids: torch.Tensor  # [b]
    inner: object = None


def rows(width: int) -> Rows:
    return Rows(torch.arange(3 * width * 2).view(3, width, 2).float(), torch.arange(3))


def test_shares_are_the_zig_zag_of_megatron():
    first, second = (share_of(rows(8), rank, 2).values[0, :, 0] // 2 for rank in range(2))
    assert first.tolist() == [0, 1, 6, 7]
    assert second.tolist() == [2, 3, 4, 5]
    assert share_of(rows(8), 1, 2).ids.tolist() == [0, 1, 2]


def round_trip_rank():
    import torch.distributed as dist

    from megatron_tropd.context_parallel import whole_of

    dist.init_process_group("gloo")
    size, rank = dist.get_world_size(), dist.get_rank()
    whole = rows(8 * size)
    whole.inner = rows(8 * size)
    share = share_of(whole, rank, size)
    share.inner = share_of(whole.inner, rank, size)
    found = whole_of(share, dist.group.WORLD)
    assert torch.equal(found.values, whole.values)
    assert torch.equal(found.inner.values, whole.inner.values)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shares_put_together_are_the_whole(size):
    run_distributed(round_trip_rank, size)


def material(size: int):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8 * size, 2, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def attention_rank(dtype):
    from types import SimpleNamespace

    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tropd import parallel
    from megatron_tropd.config import ModelConfig
    from megatron_tropd.context_parallel import ContextParallelAttention

    size = int(os.environ["WORLD_SIZE"])
    groups = parallel.initialize(ModelConfig(context_parallel_size=size))
    sizes = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "hidden_size": 64, "num_layers": 1}
    config = TransformerConfig(**sizes, context_parallel_size=size, attention_dropout=0.0)
    attention = ContextParallelAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(tp=groups.tp, cp=groups.cp)
    )
    shares = [
        share_of(Rows(t.transpose(0, 1), None), groups.cp_rank, size).values.transpose(0, 1).to(dtype)
        for t in material(size)
    ]
    q, k, v = (t.clone().requires_grad_() for t in shares[:3])
    out = attention(q, k, v, None)
    out.backward(shares[3].flatten(2))
    return out.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("size", [2, 4])
def test_attention_over_shares_is_attention_over_the_whole(size):
    q, k, v, upstream = material(size)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    wide = [t.permute(1, 2, 0, 3) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    scores = wide[0] @ wide[1].transpose(-1, -2) / 4
    causal = torch.ones(8 * size, 8 * size, dtype=torch.bool).tril()
    out = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ wide[2]
    out = out.permute(2, 0, 1, 3).flatten(2)
    out.backward(upstream.flatten(2))
    for rank, found in enumerate(run_distributed(attention_rank, size, torch.float32)):
        for ours, theirs in zip(found, (out.detach(), q.grad, k.grad, v.grad), strict=True):
            assert_close(
                ours, share_of(Rows(theirs.transpose(0, 1), None), rank, size).values.transpose(0, 1), torch.float32
            )
