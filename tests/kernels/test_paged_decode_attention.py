"""Paged decode attention in plain PyTorch and Triton against a float64 reference, and that against plain attention."""

import pytest
import torch
from support.helpers import assert_close

from megatron_tropd.kernels import paged_decode_attention
from megatron_tropd.kernels.paged_attention import reference

PAGE, KV_HEADS = 16, 2
LENGTHS = [1, 16, 0, 17, 75, 40]  # the third is a padding row
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_cache(heads, width, dtype, seed=0, lengths=LENGTHS):
    """Random queries, and a cache of shuffled blocks that is NaN wherever no request has a token."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(blocks) + 1, generator=generator).tolist()
    caches = torch.full((2, len(order), PAGE, KV_HEADS, width), torch.nan)
    table = torch.full((len(lengths), max(blocks) + 2), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        for i in range(blocks[row]):
            table[row, i] = order.pop()
            count = min(PAGE, length - i * PAGE)
            caches[:, table[row, i], :count] = torch.randn(2, count, KV_HEADS, width, generator=generator)
    q = torch.randn(len(lengths), heads, width, generator=generator)
    caches = caches.to(dtype).to(DEVICE)
    return q.to(dtype).to(DEVICE), *caches, torch.tensor(lengths, dtype=torch.int32).to(DEVICE), table.to(DEVICE)


def test_the_reference_is_attention_over_the_tokens_in_order():
    q, keys, values, lengths, table = make_cache(4, 8, torch.float64)
    out = reference.attend(q, keys, values, lengths, table, 8**-0.5, -1)
    assert not out[2].any()
    for row in (3, 4):
        n = LENGTHS[row]
        blocks = table[row, : -(-n // PAGE)].long()
        k, v = (c[blocks].flatten(0, 1)[:n].repeat_interleave(2, 1).transpose(0, 1)[None] for c in (keys, values))
        plain = torch.nn.functional.scaled_dot_product_attention(q[row][None, :, None], k, v)
        torch.testing.assert_close(out[row], plain[0, :, 0])


@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("window", [-1, 0, 20])
@pytest.mark.parametrize(("heads", "width"), [(2, 16), (6, 64), (32, 24)])
def test_every_implementation_equals_float64(implementation, window, heads, width):
    if implementation == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed")
    for dtype in (torch.float32, torch.bfloat16):
        material = make_cache(heads, width, dtype)
        if implementation == "chunked":  # it multiplies what it masks by zero
            material = tuple(t.nan_to_num(0.0) if t.is_floating_point() else t for t in material)
        options = {"window": window, "scale": 0.3}
        out = paged_decode_attention(*material, implementation=implementation, **options)
        expected = paged_decode_attention(*material, implementation="reference", **options)
        assert out.dtype == dtype
        assert not out[2].any()
        assert_close(out, expected, dtype)


def test_long_requests_are_cut_into_parts_and_merged():
    triton_passes = pytest.importorskip("megatron_tropd.kernels.paged_attention.triton", reason="no triton")
    material = make_cache(4, 16, torch.float32, lengths=[700, 3, 1024])
    assert triton_passes.part_count(3 * KV_HEADS, 64 * PAGE, 132) == 4
    parts = triton_passes.part_count
    for count in (1, 2, 5):
        triton_passes.part_count = lambda *sizes, count=count: count
        try:
            out = paged_decode_attention(*material, implementation="triton", window=600)
        finally:
            triton_passes.part_count = parts
        assert_close(out, paged_decode_attention(*material, implementation="reference", window=600))


def test_parts_fill_the_device_and_no_more():
    triton_passes = pytest.importorskip("megatron_tropd.kernels.paged_attention.triton", reason="no triton")
    assert triton_passes.part_count(256 * 8, 8192, 132) == 1  # programs enough
    assert triton_passes.part_count(8, 8192, 132) == 32  # at least 256 tokens each, at most 32 parts
    assert triton_passes.part_count(8, 512, 132) == 2
    assert triton_passes.part_count(8, 64, 132) == 1


def test_shapes_that_do_not_fit_are_named():
    q, keys, values, lengths, table = make_cache(4, 8, torch.float32)
    with pytest.raises(ValueError, match=r"need caches \[p, z, g, 8\]"):
        paged_decode_attention(q[:, :3], keys, values, lengths, table)
    with pytest.raises(ValueError, match="need as many lengths"):
        paged_decode_attention(q, keys, values, lengths[:2], table)
    pytest.importorskip("triton", reason="the package triton is not installed")
    with pytest.raises(ValueError, match="multiple of 16 tokens, not 8"):
        paged_decode_attention(q, keys[:, :8], values[:, :8], lengths, table, implementation="triton")


@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_a_captured_call_follows_growing_lengths():
    q, keys, values, lengths, table = make_cache(4, 64, torch.bfloat16)
    paged_decode_attention(q, keys, values, lengths, table)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_decode_attention(q, keys, values, lengths, table)
    lengths[4] = 12
    lengths[2] = 0
    graph.replay()
    assert_close(out, paged_decode_attention(q, keys, values, lengths, table, implementation="reference"))
