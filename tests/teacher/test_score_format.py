"""Scores on their way: every number comes back to the bit, whatever is sent and in whichever dtype."""

import pytest
import torch

from megatron_tropd.teacher.score_format import ScoreFormat
from megatron_tropd.types import TeacherScores


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("topk", [0, 5])
@pytest.mark.parametrize(("size", "dtype"), [(0, torch.float32), (7, torch.float32), (7, torch.bfloat16)])
def test_what_was_packed_is_unpacked(topk, with_entropy, size, dtype):
    shape = (2, 3)
    scores = TeacherScores(
        logprobs=torch.randn(shape),
        topk_ids=torch.randint(1 << 30, (*shape, topk), dtype=torch.int32),
        topk_logprobs=torch.randn(*shape, topk),
        entropy=torch.rand(shape) if with_entropy else None,
        hidden=torch.randn(3, 2, size).to(dtype).transpose(0, 1) if size else None,
    )
    format = ScoreFormat(topk, with_entropy, size, dtype)
    packed = format.pack(scores)
    assert packed.shape == (*shape, format.channels)
    assert packed.dtype == torch.int32
    found = format.unpack(packed)
    for name, expected in vars(scores).items():
        if expected is None:
            assert getattr(found, name) is None
        else:
            assert torch.equal(getattr(found, name), expected), name
            assert getattr(found, name).dtype == expected.dtype
    storages = {t.untyped_storage().data_ptr() for t in vars(found).values() if t is not None and t.numel()}
    assert storages == {packed.untyped_storage().data_ptr()}  # nothing is copied


def test_hidden_states_of_a_70b_teacher_take_two_bytes_a_number():
    assert ScoreFormat(0, False, 8192, torch.bfloat16).channels == 1 + 4096
