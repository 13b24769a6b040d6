"""Forward KL(teacher ‖ student) on held-out text: exact, over the whole vocabulary, under any parallel layouts.

The text is the teacher's own (prompts with a `teacher_response`), so the number is what the student has yet to learn
of the teacher's behaviour, in nats a token. The teacher's hidden states live for a few micro-batches, on the student's
last stage only, where they meet the teacher's output layer in the student's shards.

    held_out = HeldOut(prompts, tokenizer, student, teacher, divergence)
    held_out.measure()      # {"held_out_kl": 0.83, "held_out_kl_low": 0.79, ...}, the same on every rank
"""

from __future__ import annotations

import glob
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_tropd.config import DataConfig
from megatron_tropd.mcore.compat import run_schedule
from megatron_tropd.numbers.finite_weights import everywhere
from megatron_tropd.numbers.flags import ABSURD
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.parallel.batching import microbatches, pad_rollouts
from megatron_tropd.parallel.micro_batches import Pairs, split_batch
from megatron_tropd.prompts.responses import Responses
from megatron_tropd.prompts.source import evaluation_data, load_prompts
from megatron_tropd.rounding import ceil_div, round_up
from megatron_tropd.types import LOSS_NONE, Prompt, Rollouts, TrainingBatch, UserError

if TYPE_CHECKING:
    from megatron_tropd.teacher.hook import TeacherHook
    from megatron_tropd.teacher.remote import RemoteTeacher
    from megatron_tropd.tokenizers.tokenizer import Tokenizer
    from megatron_tropd.training.student import Student

logger = logging.getLogger(__name__)


@dataclass
class _Hidden:
    """The teacher's hidden states, cut like a batch; None before the student's last stage."""

    states: torch.Tensor | None  # [b, s, h]


class HeldOut:
    """Measures the divergence between two models on a fixed set of teacher-written responses."""

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
        student: Student,
        teacher: TeacherHook | RemoteTeacher,
        divergence: Divergence,
        *,
        micro_batch_size: int = 4,
        max_response_tokens: int | None = None,
        pad_multiple: int = 8,
    ):
        """Tokenize the held-out text.

        Args:
            prompts: tokenized, each with a `teacher_response`; every data-parallel rank gets all of them.
            tokenizer: encodes the responses; no EOS is added, since a response may have been cut by its length.
            student: evaluated as it is at each `measure`.
            teacher: attached to its model, or on dedicated ranks.
            divergence: what to measure, with the teacher's output layer.
            micro_batch_size: sequences a forward pass.
            max_response_tokens: responses are cut to this many tokens.
            pad_multiple: of the sequence length, for sequence parallelism.

        Raises:
            UserError: a prompt has no teacher response.
        """
        self.groups = groups = student.groups
        self.micro_batch_size = micro_batch_size
        self._student, self._teacher, self._divergence = student, teacher, divergence
        self._group_rows = micro_batch_size * groups.micro_batch_multiple
        longest = ceil_div(len(prompts), groups.dp_size)  # of every replica, fillers at the last ones
        mine = prompts[groups.dp_rank :: groups.dp_size]
        self._names = [prompt.id for prompt in mine]
        responses = [_response_tokens(prompt, tokenizer, max_response_tokens) for prompt in mine]
        self._batch = pad_rollouts(
            _as_rollouts(mine, responses),
            pad_multiple=pad_multiple,
            row_multiple=round_up(longest, self._group_rows),
            pad_id=tokenizer.pad_id,
            device=groups.device,
        )

    def measure(self, on_nan: str = "stop") -> dict[str, float]:
        """Return `held_out_kl`, the mean over all response tokens in nats, its `interval`, and `held_out_tokens`.

        Collective over all ranks of both models; the same answer everywhere. Leaves the student in eval mode.

        Raises:
            UserError: a divergence is not finite, unless `on_nan` is skip, which warns.
        """
        groups, rows_per_rank = self.groups, len(self._batch.tokens)
        table = torch.zeros(groups.dp_size, rows_per_rank, 4, dtype=torch.float64, device=groups.device)
        for module in self._student.modules:
            module.eval()
        with torch.no_grad(), self._teacher.weights():
            for i, rows in enumerate(microbatches(self._batch, self._group_rows)):
                hidden = self._teacher.hidden_states(rows, self.micro_batch_size)
                for j, sums in enumerate(self._student_pass(rows, _Hidden(hidden))):
                    first = i * self._group_rows + j * self.micro_batch_size
                    table[groups.dp_rank, first : first + self.micro_batch_size] = sums
        dist.all_reduce(table, group=groups.dp_cp)
        dist.all_reduce(table, group=groups.pp)  # the earlier stages hold zeros
        bad_teacher, bad = table[..., 2:].sum((0, 1)).tolist()
        if bad:
            self._refuse("teacher" if bad_teacher else "student", int(bad), table[groups.dp_rank, :, 3], on_nan)
        sums, tokens = table.flatten(0, 1)[table[..., 1].flatten() > 0, :2].unbind(-1)  # [responses], without fillers
        found = {"held_out_kl": (sums.sum() / tokens.sum().clamp(min=1)).item(), "held_out_tokens": int(tokens.sum())}
        return found | interval(found["held_out_kl"], sums.tolist(), tokens.tolist())

    def _refuse(self, model: str, tokens: int, bad: torch.Tensor, on_nan: str) -> None:
        """Raise UserError, or warn, with the prompts of which a token's divergence is not finite; collective.

        Args:
            model: the one to blame.
            tokens: how many tokens of the whole job have no finite divergence.
            bad: [rows] how many of each row of this replica.
            on_nan: "stop" or "skip".
        """
        names = everywhere([repr(name) for name, count in zip(self._names, bad.tolist(), strict=False) if count])
        names = list(dict.fromkeys(names))  # every rank of a replica names the same
        message = (
            f"the held-out divergence is NaN or infinite at {tokens} tokens, for the {model}'s hidden states or "
            f"logits, of the prompts {', '.join(names[:8])}. Look at the {model}'s weights and "
            f"{model}.dtype."
        )
        if on_nan == "stop":
            raise UserError(message)
        if dist.get_rank() == 0:
            logger.warning(message)

    def _student_pass(self, rows: TrainingBatch, hidden: _Hidden) -> list[torch.Tensor]:
        """Run some rows; return each micro-batch's `_sums`, on the last stage."""
        split = split_batch(rows, self.groups, self.micro_batch_size)
        return run_schedule(
            self.groups,
            self._forward_step,
            Pairs(split.batches, split.take(hidden)),
            self._student.modules,
            seq_length=split.seq_length,
            micro_batch_size=split.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _forward_step(
        self, data_iterator: Iterator[tuple[TrainingBatch, _Hidden]], model: torch.nn.Module
    ) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
        rows, theirs = next(data_iterator)
        mask = rows.loss_kind != LOSS_NONE

        def read(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            assert theirs.states is not None  # this is the last stage
            return self._divergence(hidden, weight, theirs.states, mask).unsqueeze(-1)  # [s, b, 1]

        with self._student.hook.replaced(read):
            output = model(rows.tokens, rows.position_ids, None)
        return output, partial(_sums, mask=mask, hidden=theirs.states)


def _sums(
    output: torch.Tensor, non_loss_data: bool = True, *, mask: torch.Tensor, hidden: torch.Tensor | None
) -> torch.Tensor:
    """Return [b, 4], by row: the sum of the divergence, and how many tokens, bad ones of the teacher, bad ones."""
    assert hidden is not None  # Megatron asks on the last stage alone
    bad_teacher = ~torch.isfinite(hidden.sum(-1, dtype=torch.float32)) & mask
    bad = ~(output.detach().abs() < ABSURD)
    return torch.stack([part.double().flatten(1).sum(1) for part in (output, mask, bad_teacher, bad)], dim=-1)


def interval(mean: float, sums: list[float], tokens: list[float]) -> dict[str, float]:
    """Return the 95 % interval of a mean over tokens as `held_out_kl_low` and `_high`, if it has one.

    There is none of one response, or of a mean that is not finite.

    Tokens of one response are alike, so it is the responses that count as independent.

    Args:
        mean: sum of `sums` over the sum of `tokens`.
        sums: the divergence of each response.
        tokens: the number of tokens of each.
    """
    n = len(sums)
    if n < 2 or not math.isfinite(mean):
        return {}
    squares = sum((s - mean * t) ** 2 for s, t in zip(sums, tokens, strict=True))
    half = 1.96 * (squares * n / (n - 1)) ** 0.5 / sum(tokens)
    return {"held_out_kl_low": max(0.0, mean - half), "held_out_kl_high": mean + half}


def load_held_out(
    path: str | Path | list[str],
    responses: str | Path | list[str] | None,
    tokenizer: Tokenizer,
    max_tokens: int | None = None,
    data: DataConfig | None = None,
) -> list[Prompt]:
    """Read held-out prompts with the teacher's responses to them.

    Args:
        path: files of prompts.
        responses: files of `{"id", "teacher_response"}`, as `megatron-tropd generate` writes them; None when the
            prompts carry their own.
        tokenizer: encodes the prompts.
        max_tokens: longest prompt.
        data: `data.columns.*` as far as the files have them.

    Raises:
        UserError: a file cannot be read, or a prompt has no response.
    """
    require = ("teacher_response",) if responses is None else ()
    prompts = load_prompts(path, tokenizer, max_tokens, require, key="evaluation.held_out", data=evaluation_data(data))
    if responses is None:
        return prompts
    if isinstance(responses, str | Path) and not glob.has_magic(str(responses)) and not Path(responses).exists():
        raise UserError(f"evaluation.held_out_responses={responses}: no such file; {_remedy(path, responses)}")
    by_id = Responses(responses, "evaluation.held_out_responses", data.columns if data else None)
    found = {prompt.id: by_id.get(prompt.id) for prompt in prompts}
    missing = [name for name, response in found.items() if response is None]
    if missing:
        raise UserError(
            f"{responses}: no teacher_response for {len(missing)} of the {len(prompts)} prompts of {path}, such as "
            f"{missing[0]!r}; {_remedy(path, responses)}"
        )
    texts = {name: response[0] for name, response in found.items() if response is not None}
    return [replace(prompt, teacher_response=texts[prompt.id]) for prompt in prompts]


def _remedy(path: str | Path | list[str], responses: str | Path | list[str]) -> str:
    command = f"megatron-tropd generate --model teacher --field teacher_response --prompts {path} --output {responses}"
    return f"write it with `{command}` and the recipe"


def _response_tokens(prompt: Prompt, tokenizer: Tokenizer, limit: int | None) -> list[int]:
    tokens = tokenizer.encode_response_to(prompt, prompt.teacher_response) if prompt.teacher_response else []
    if not tokens:
        raise UserError(
            f"held-out prompt {prompt.id!r} has no teacher_response: the divergence is measured on the teacher's own "
            "text; write it with `megatron-tropd generate --model teacher` and name that file in evaluation.held_out"
        )
    return tokens[:limit]


def _as_rollouts(prompts: list[Prompt], responses: list[list[int]]) -> Rollouts:
    return Rollouts(
        tokens=[[*prompt.tokens, *response] for prompt, response in zip(prompts, responses, strict=True)],
        prompt_lengths=[len(prompt.tokens) for prompt in prompts],
        prefix_lengths=[len(response) for response in responses],  # all of it teacher-written
        lengths=[len(p.tokens) + len(r) for p, r in zip(prompts, responses, strict=True)],
        logprobs=[[] for _ in prompts],
        finish_reasons=["prefix"] * len(prompts),
        sample_ids=list(range(len(prompts))),
    )
