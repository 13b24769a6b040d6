"""Paged attention in plain PyTorch against attention over each request's tokens laid out plainly, in float64."""

import pytest
import torch
from support.helpers import assert_close

from megatron_tropd.mcore import paged_attention
from megatron_tropd.mcore.paged_attention import flash_attn_varlen_func, flash_attn_with_kvcache

SIZE, KV_HEADS, WIDTH = 4, 2, 8  # tokens per block, key/value heads, head width


def _paged(lengths, dtype=torch.float32, seed=0):
    """Random keys and values of requests, and the same in a cache of shuffled blocks whose other tokens are large."""
    generator = torch.Generator().manual_seed(seed)
    plain = [torch.randn(2, n, KV_HEADS, WIDTH, generator=generator).to(dtype) for n in lengths]
    per_request = [-(-n // SIZE) for n in lengths]
    order = torch.randperm(sum(per_request) + 2, generator=generator).tolist()
    cache = torch.full((2, len(order), SIZE, KV_HEADS, WIDTH), 1e4, dtype=dtype)
    table = torch.full((len(lengths), max(per_request) + 1), -1, dtype=torch.int32)
    for i, (tensors, blocks) in enumerate(zip(plain, per_request, strict=True)):
        for b in range(blocks):
            block = order.pop()
            table[i, b] = block
            part = tensors[:, b * SIZE : (b + 1) * SIZE]
            cache[:, block, : part.size(1)] = part
    return plain, cache[0], cache[1], table


def _reference(q, kv, window=-1):
    """Attend from the last rows q [s, a, d] to all of kv [2, n, g, d], in float64."""
    keys, values = kv.double().repeat_interleave(q.size(1) // KV_HEADS, dim=2)
    scores = torch.einsum("sad,nad->asn", q.double(), keys) * WIDTH**-0.5
    distance = torch.arange(len(keys) - len(q), len(keys))[:, None] - torch.arange(len(keys))
    hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
    return torch.einsum("asn,nad->sad", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


@pytest.mark.parametrize("heads", [2, 6], ids=["as many heads", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_attends_to_all_cached_tokens(heads, dtype):
    lengths = [1, 4, 5, 13, 8]
    plain, keys, values, table = _paged(lengths, dtype)
    q = torch.randn(5, 1, heads, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = flash_attn_with_kvcache(q, keys, values, torch.tensor(lengths, dtype=torch.int32), table, causal=True)
    assert out.shape == q.shape
    assert out.dtype == dtype
    for i in range(5):
        assert_close(out[i], _reference(q[i], plain[i]), dtype)


def test_several_new_tokens_see_those_before_them():
    lengths = [3, 9]
    plain, keys, values, table = _paged(lengths)
    q = torch.randn(2, 3, 4, WIDTH)
    out = flash_attn_with_kvcache(q, keys, values, torch.tensor(lengths), table)
    for i in range(2):
        assert_close(out[i], _reference(q[i], plain[i]), torch.float32)


def test_padding_rows_do_no_harm():
    plain, keys, values, table = _paged([6, 3])
    table = torch.cat([table, torch.full((2, table.size(1)), -1, dtype=torch.int32)])
    q = torch.randn(4, 1, 4, WIDTH)
    out = flash_attn_with_kvcache(q, keys, values, torch.tensor([6, 3, 0, 0], dtype=torch.int32), table)
    assert out.isfinite().all()
    for i in range(2):
        assert_close(out[i], _reference(q[i], plain[i]), torch.float32)


@pytest.mark.parametrize("window", [0, 2, 100])
def test_a_window_hides_what_is_far_to_the_left(window):
    plain, keys, values, table = _paged([11, 5])
    q = torch.randn(2, 1, 4, WIDTH)
    out = flash_attn_with_kvcache(q, keys, values, torch.tensor([11, 5]), table, window_size=(window, 0))
    for i in range(2):
        assert_close(out[i], _reference(q[i], plain[i], window), torch.float32)


@pytest.mark.parametrize("window", [-1, 3])
def test_prefill_and_decode_mix_in_one_batch(window):
    """New tokens: a whole prompt, one decoded token, the rest of a prompt, one more, a prompt of one token."""
    cached, new = [6, 13, 9, 4, 1], [6, 1, 5, 1, 1]
    plain, keys, values, table = _paged(cached)
    starts = [0, 6, 7, 12, 13, 14]
    q = torch.randn(17, 4, WIDTH)  # three rows of padding
    out = flash_attn_varlen_func(
        *(q, keys, values),
        *(torch.tensor(starts, dtype=torch.int32), torch.tensor([0, 6, 19, 28, 32, 33], dtype=torch.int32)),
        *(max(new), max(cached)),
        causal=True,
        window_size=(window, window),
        block_table=table,
    )
    assert out.shape == q.shape
    for i, (start, count) in enumerate(zip(starts[:-1], new, strict=True)):
        assert_close(out[start : start + count], _reference(q[start : start + count], plain[i], window), torch.float32)
    assert not out[14:].any()


def test_a_given_scale_replaces_the_default():
    plain, keys, values, table = _paged([7])
    q = torch.randn(1, 1, 4, WIDTH)
    scaled = flash_attn_with_kvcache(q, keys, values, torch.tensor([7]), table, softmax_scale=0.5)
    assert_close(scaled[0], _reference(q[0] * 0.5 * WIDTH**0.5, plain[0]), torch.float32)


@pytest.mark.parametrize("window", [-1, 3])
def test_prefills_in_one_call_equal_those_one_by_one(window, monkeypatch):
    """The first takes torch's variable-length attention, here a stand-in of plain attention by sequence."""

    def attend(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale, window):
        assert (longest_q, longest_k) == (ends_q.diff().max(), ends_k.diff().max())
        rows = zip(ends_q.tolist(), ends_q[1:].tolist(), ends_k.tolist(), ends_k[1:].tolist(), strict=False)
        parts = [_reference(q[a:b], torch.stack((k[c:d], v[c:d])), window) for a, b, c, d in rows]
        return torch.cat(parts).to(q.dtype)

    cached, new = [6, 13, 9, 4, 2], [6, 1, 5, 1, 2]
    _, keys, values, table = _paged(cached)
    starts = [0, 6, 7, 12, 13, 15]
    q = torch.randn(18, 4, WIDTH)
    arguments = (
        *(q, keys, values, torch.tensor(starts, dtype=torch.int32)),
        *(torch.tensor([0, 6, 19, 28, 32, 34], dtype=torch.int32), max(new), max(cached)),
    )
    options = {"window_size": (window, window), "block_table": table}
    one_by_one = flash_attn_varlen_func(*arguments, **options)
    monkeypatch.setattr(paged_attention, "attends_variable_lengths", lambda q: True)
    monkeypatch.setattr(paged_attention, "variable_length_attention", attend)
    assert_close(flash_attn_varlen_func(*arguments, **options), one_by_one)
