"""Attention over packed sequences and context-parallel shares: against float64 attention by hand, gradients too."""

import os
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support.helpers import assert_close, run_distributed

from megatron_tropd.parallel.context_parallel import share_places

SEQUENCES = {"one": [64], "packed": [16, 8, 32, 8]}  # lengths of the sequences that make up 64 tokens


def material():
    """q, k, v [64, heads, 16] and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, heads, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)]


def ends_of(lengths):
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def places_of(lengths, rank, size):
    """Where in the 64 tokens a rank's tokens lie: its share of each sequence."""
    ends = ends_of(lengths)
    return torch.cat([start + share_places(stop - start, rank, size) for start, stop in pairwise(ends)])


def attention_rank(lengths, packed):
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_tropd.config import ModelConfig
    from megatron_tropd.mcore.plain_attention import PlainAttention
    from megatron_tropd.parallel import groups as parallel

    size = int(os.environ["WORLD_SIZE"])
    groups = parallel.initialize(ModelConfig(context_parallel_size=size))
    sizes = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16, "hidden_size": 64, "num_layers": 1}
    config = TransformerConfig(**sizes, context_parallel_size=size, attention_dropout=0.0)
    attention = PlainAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=SimpleNamespace(tp=groups.tp, cp=groups.cp)
    )
    places = places_of(lengths, groups.cp_rank, size)
    q, k, v, upstream = (t[places].float() for t in material())
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    if packed:
        ends = torch.tensor(ends_of(lengths), dtype=torch.int32)
        out = attention(*leaves, None, packed_seq_params=PackedSeqParams("thd", ends, ends))
        out.backward(upstream.flatten(1))
    else:
        out = attention(*(t[:, None] for t in leaves), None)[:, 0]  # a batch of one
        out.backward(upstream.flatten(1))
    return out.detach(), *(t.grad for t in leaves)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(("name", "packed"), [("one", False), ("one", True), ("packed", True)])
def test_each_token_sees_its_own_sequence_up_to_itself(size, name, packed):
    lengths = SEQUENCES[name]
    q, k, v, upstream = material()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wide = [t.transpose(0, 1) for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    visible = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool().tril()
    scores = (wide[0] @ wide[1].transpose(-1, -2) / 4).masked_fill(~visible, -torch.inf)
    out = (scores.softmax(-1) @ wide[2]).transpose(0, 1).flatten(1)
    out.backward(upstream.flatten(1))
    for rank, found in enumerate(run_distributed(attention_rank, size, lengths, packed)):
        places = places_of(lengths, rank, size)
        for ours, theirs in zip(found, (out.detach(), *(t.grad for t in leaves)), strict=True):
            assert_close(ours, theirs[places], torch.float32)
