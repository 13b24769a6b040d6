"""vocab_parallel_topk against a float64 sort of the whole vocabulary, under every sharding."""

import pytest
import torch
import torch.distributed as dist
from support.collectives import count_collectives
from support.helpers import run_distributed
from support.topk_cases import ROWS, VOCAB, cases, expected

from megatron_tropd.kernels import vocab_parallel_topk


def rank_main(size):
    dist.init_process_group("gloo")
    results = []
    for logits in cases().values():
        for dtype in (torch.float32, torch.bfloat16):
            for k in (1, 8, 40, VOCAB):  # 40 and 61 exceed a shard's columns
                shard = logits.to(dtype).chunk(size, 1)[dist.get_rank()].contiguous()
                mask = torch.arange(ROWS) != 4
                with count_collectives() as calls:
                    values, ids = vocab_parallel_topk(shard, k, dist.group.WORLD, VOCAB, temperature=1.7, mask=mask)
                results.append((values, ids, len(calls)))
    return results


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ids_and_logprobs_equal_a_float64_sort_under_every_sharding(size):
    ranks = run_distributed(rank_main, size, size)
    place = 0
    for logits in cases().values():
        for dtype in (torch.float32, torch.bfloat16):
            for k in (1, 8, 40, VOCAB):
                values, ids, collectives = ranks[0][place]
                wanted = expected(logits.to(dtype), k, 1.7, torch.arange(ROWS) != 4)
                assert torch.equal(ids, wanted[1])
                torch.testing.assert_close(values.double(), wanted[0], rtol=1e-5, atol=1e-5)
                assert collectives <= 1
                assert all(torch.equal(rank[place][1], ids) for rank in ranks)
                place += 1


def test_no_gradient_and_out_of_range_k():
    logits = torch.randn(3, 8).requires_grad_()
    assert not vocab_parallel_topk(logits, 2, None, 8)[0].requires_grad
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k={k} must lie in"):
            vocab_parallel_topk(logits, k, None, 8)
