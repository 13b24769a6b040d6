"""torch's variable-length attention as its versions take it: with stand-ins of their signatures, and on CUDA itself."""

import pytest
import torch
from support.helpers import assert_close

from megatron_tropd.parallel import variable_length
from megatron_tropd.parallel.variable_length import attends_variable_lengths, variable_length_attention

LENGTHS_Q, LENGTHS_K = [5, 1, 7], [5, 9, 7]
HEADS, GROUPS, WIDTH = 4, 2, 16
ON_CUDA = torch.cuda.is_available()


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def plain(q, k, v, lengths_q, lengths_k, scale, window):
    """Attend sequence by sequence in float64; the last query sees the last key."""
    out, start, stop = [], ends(lengths_q), ends(lengths_k)
    for i, (m, n) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        own = q[start[i] : start[i + 1]].double()  # [m, a, d]
        keys, values = (
            t[stop[i] : stop[i + 1]].double().repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v)
        )  # [n, a, d]
        scores = torch.einsum("mad,nad->amn", own, keys) * scale
        distance = torch.arange(n - m, n)[:, None] - torch.arange(n)
        hidden = (distance < 0) | ((distance > window) if window >= 0 else False)
        weights = scores.masked_fill(hidden.to(q.device), -torch.inf).softmax(-1)
        out.append(torch.einsum("amn,nad->mad", weights, values))
    return torch.cat(out)


def as_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal
    assert query.size(1) == key.size(1)
    return plain(query, key, value, cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist(), WIDTH**-0.5, -1)


def as_torch_2_11(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert window_size[1] == 0
    assert query.size(1) == key.size(1)
    lengths = (cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist())
    assert (max_q, max_k) == tuple(map(max, lengths))
    return plain(query, key, value, *lengths, WIDTH**-0.5 if scale is None else scale, window_size[0])


def as_torch_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa
    lengths = (cu_seq_q.diff().tolist(), cu_seq_k.diff().tolist())
    return plain(query, key, value, *lengths, WIDTH**-0.5 if scale is None else scale, window_size[0])


def material(dtype, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(LENGTHS_Q), HEADS), (sum(LENGTHS_K), GROUPS), (sum(LENGTHS_K), GROUPS))
    return [torch.randn(*shape, WIDTH, generator=generator).to(dtype).to(device) for shape in shapes]


@pytest.mark.parametrize("installed", [as_torch_2_10, as_torch_2_11, as_torch_2_13])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_every_version_is_called_as_it_wants(installed, scale, monkeypatch):
    monkeypatch.setattr(variable_length, "_varlen_attn", lambda: installed)
    q, k, v = material(torch.float64)
    lengths = (ends(LENGTHS_Q), ends(LENGTHS_K), max(LENGTHS_Q), max(LENGTHS_K))
    expected = plain(q, k, v, LENGTHS_Q, LENGTHS_K, WIDTH**-0.5 if scale is None else scale, -1)
    assert_close(variable_length_attention(q, k, v, *lengths, scale=scale), expected)
    if installed is not as_torch_2_10:  # it has no window
        expected = plain(q, k, v, LENGTHS_Q, LENGTHS_K, WIDTH**-0.5 if scale is None else scale, 3)
        assert_close(variable_length_attention(q, k, v, *lengths, scale=scale, window=3), expected)


def test_it_is_for_half_precision_on_cuda():
    assert not attends_variable_lengths(material(torch.bfloat16)[0])
    if ON_CUDA:
        assert not attends_variable_lengths(material(torch.float32, "cuda")[0])


@pytest.mark.skipif(not ON_CUDA, reason="no CUDA device")
def test_values_and_gradients_equal_float64_on_cuda():
    leaves = [t.requires_grad_() for t in material(torch.bfloat16, "cuda")]
    if not attends_variable_lengths(leaves[0]):
        pytest.skip("torch's variable-length attention is not there")
    lengths = (ends(LENGTHS_Q).cuda(), ends(LENGTHS_K).cuda(), max(LENGTHS_Q), max(LENGTHS_K))
    out = variable_length_attention(*leaves, *lengths, scale=0.3)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = plain(*exact, LENGTHS_Q, LENGTHS_K, 0.3, -1)
    assert_close(out, expected, torch.bfloat16)
    upstream = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=3e-2, atol=3e-2)
