"""The programs of the kernels' README, run as they stand there."""

import re
from pathlib import Path

import torch
import torch.distributed as dist
from support.helpers import assert_close, run_distributed

README = Path(__file__).parents[2] / "kernels" / "README.md"


def _run(number):
    """Return the variables that README's program number `number` leaves."""
    programs = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(programs) == 2
    variables = {"__name__": "readme"}
    exec(compile(programs[number], "kernels/README.md", "exec"), variables)
    return variables


def test_in_one_process():
    found = _run(0)
    logits = found["logits"].detach().clone().requires_grad_()
    everything = logits[..., :61].log_softmax(-1)
    expected = everything.gather(-1, found["ids"])
    expected.sum().backward()
    assert_close(found["logprobs"], expected)
    assert_close(found["entropy"], -(everything.exp() * everything).sum(-1))
    assert_close(found["logits"].grad, logits.grad)


def _shard():
    found = _run(1)
    dist.destroy_process_group()
    return found["logprobs"].detach(), found["entropy"], found["logits"].grad


def test_under_tensor_parallelism():
    whole = _run(0)
    ranks = run_distributed(_shard, 2)
    for logprobs, entropy, _ in ranks:
        assert_close(logprobs, whole["logprobs"].detach())
        assert_close(entropy, whole["entropy"])
    assert_close(torch.cat([gradient for _, _, gradient in ranks], dim=-1), whole["logits"].grad)
