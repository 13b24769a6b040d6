"""Shares of sequences, by hand."""

from dataclasses import dataclass

import torch

from megatron_tropd.parallel.context_parallel import share_of, share_places


@dataclass
class Rows:
    values: torch.Tensor  # [b, s, 2]
    ids: torch.Tensor  # [b]


def rows(width: int) -> Rows:
    return Rows(torch.arange(3 * width * 2).view(3, width, 2).float(), torch.arange(3))


def test_shares_are_the_zig_zag_of_megatron():
    first, second = (share_of(rows(8), rank, 2).values[0, :, 0] // 2 for rank in range(2))
    assert first.tolist() == [0, 1, 6, 7]
    assert second.tolist() == [2, 3, 4, 5]
    assert share_of(rows(8), 1, 2).ids.tolist() == [0, 1, 2]


def test_places_say_what_a_share_holds():
    whole = torch.arange(24)
    for rank in range(3):
        assert torch.equal(share_places(24, rank, 3), share_of(Rows(whole[None], None), rank, 3).values[0])
