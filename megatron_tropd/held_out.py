"""Forward KL(teacher ‖ student) on held-out text: exact, over the whole vocabulary, under any parallel layouts.

The text is the teacher's own (prompts with a `teacher_response`), so the number is what the student has yet to learn
of the teacher's behaviour, in nats a token. Both models' logits live for one micro-batch, on the last stage only. From
a teacher of another layout come hidden states, which meet its output layer in the student's shards.

    held_out = HeldOut(prompts, tokenizer, student_chunks, teacher, groups, vocab_size=tokenizer.vocab_size)
    held_out.measure()      # {"held_out_kl": 0.83, "held_out_tokens": 1844}, the same on every rank
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_tropd.batching import microbatches, pack
from megatron_tropd.context_parallel import share_of
from megatron_tropd.megatron_compat import run_schedule, unwrap_model
from megatron_tropd.metrics import read_records
from megatron_tropd.micro_batches import split_batch
from megatron_tropd.output_hook import OutputHook
from megatron_tropd.parallel import ParallelGroups, all_shards
from megatron_tropd.prompts import load_prompts
from megatron_tropd.types import LOSS_NONE, Prompt, Rollouts, TrainingBatch, UserError

if TYPE_CHECKING:
    from megatron_tropd.remote_teacher import RemoteTeacher
    from megatron_tropd.teacher import TeacherHook
    from megatron_tropd.tokenizer import Tokenizer

# Rows of logits that are in fp32 at the same time.
_CHUNK_ROWS = 512


@dataclass
class _Rows:
    hidden: torch.Tensor  # [b, s, h]
    loss_kind: torch.Tensor  # [b, s]


class HeldOut:
    """Measures the divergence between two models on a fixed set of teacher-written responses."""

    def __init__(
        self,
        prompts: list[Prompt],
        tokenizer: Tokenizer,
        student_chunks: list[torch.nn.Module],
        teacher: TeacherHook | RemoteTeacher,
        groups: ParallelGroups,
        *,
        vocab_size: int,
        micro_batch_size: int = 4,
        max_response_tokens: int | None = None,
        pad_multiple: int = 8,
    ):
        """Tokenize the held-out text and hook both models' output layers.

        Args:
            prompts: tokenized, each with a `teacher_response`; every data-parallel rank gets all of them.
            tokenizer: encodes the responses; no EOS is added, since a response may have been cut by its length.
            student_chunks: this rank's model chunks of the student, evaluated as they are at each `measure`.
            teacher: attached to its model, or on ranks of its own.
            groups: process groups of the student.
            vocab_size: number of ids that carry probability in both models; padding lies behind them.
            micro_batch_size: sequences a forward pass.
            max_response_tokens: responses are cut to this many tokens.
            pad_multiple: of the sequence length, for sequence parallelism.

        Raises:
            UserError: a prompt has no teacher response.
        """
        self.groups = groups
        self.vocab_size = vocab_size
        self.micro_batch_size = micro_batch_size
        self._teacher = teacher
        self._models = {"student": student_chunks}
        if teacher.exchange is None:
            self._models["teacher"] = teacher.chunks
        self._hooks = {role: OutputHook(chunks) for role, chunks in self._models.items()}
        width = unwrap_model(student_chunks[-1]).vocab_size // groups.tp_size
        self._teacher_weight = teacher.output_weight(width) if teacher.exchange else None
        self._group_rows = micro_batch_size * groups.micro_batch_multiple
        longest = -(-len(prompts) // groups.dp_size)  # every replica gets as many rows, the last ones perhaps fillers
        mine = prompts[groups.dp_rank :: groups.dp_size]
        responses = [_response_tokens(prompt, tokenizer, max_response_tokens) for prompt in mine]
        self._batch = pack(
            _as_rollouts(mine, responses),
            pad_multiple=pad_multiple,
            row_multiple=-(-longest // self._group_rows) * self._group_rows,
            pad_id=tokenizer.pad_id,
            device=groups.device,
        )

    def measure(self) -> dict[str, float]:
        """Return `held_out_kl`, the mean over all response tokens in nats, and `held_out_tokens`, their number.

        Collective over all ranks of both models; the same answer everywhere. Leaves the student in eval mode.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.groups.device)
        for chunk in self._models["student"]:
            chunk.eval()
        with torch.no_grad(), self._teacher.weights():
            for rows in microbatches(self._batch, self._group_rows):
                teacher_logits = self._teacher_logits(rows)
                student_logits = self._response_logits("student", rows)
                if teacher_logits is not None and len(teacher_logits):
                    kl = forward_kl(teacher_logits, student_logits, self.groups.tp, self.vocab_size)
                    total += torch.stack([kl.double().sum(), torch.tensor(float(len(kl)), device=total.device)])
        dist.all_reduce(total, group=self.groups.dp_cp)
        dist.all_reduce(total, group=self.groups.pp)  # the earlier stages hold zeros
        kl_sum, tokens = total.tolist()
        return {"held_out_kl": kl_sum / max(tokens, 1), "held_out_tokens": int(tokens)}

    def _teacher_logits(self, rows: TrainingBatch) -> torch.Tensor | None:
        if self._teacher.exchange is None:
            return self._response_logits("teacher", rows)
        hidden = self._teacher.hidden_states(rows, self.micro_batch_size)
        if hidden is None:
            return None
        both = share_of(_Rows(hidden, rows.loss_kind), self.groups.cp_rank, self.groups.cp_size)
        kept = []
        for start in range(0, self._group_rows, self.micro_batch_size):  # in the order of the student's
            part = slice(start, start + self.micro_batch_size)
            kept.append(both.hidden[part].transpose(0, 1)[(both.loss_kind[part] != LOSS_NONE).t()])
        return torch.cat(kept) @ self._teacher_weight.t()

    def _response_logits(self, role: str, rows: TrainingBatch) -> torch.Tensor | None:
        """Run some rows; return the logits shard [n, V/tp] of their n response tokens, None on earlier stages."""
        kept: list[torch.Tensor] = []
        split = split_batch(rows, self.groups, self.micro_batch_size)
        run_schedule(
            self.groups,
            partial(self._forward_step, role=role, kept=kept),
            split.batches,
            self._models[role],
            seq_length=split.seq_length,
            micro_batch_size=split.micro_batch_size,
            forward_only=True,
            collect_non_loss_data=True,
        )
        return torch.cat(kept) if kept else None

    def _forward_step(self, data_iterator, model: torch.nn.Module, *, role: str, kept: list[torch.Tensor]):
        rows = next(data_iterator)

        def keep_responses(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [s, b, V/tp]
            kept.append(logits[(rows.loss_kind != LOSS_NONE).t()])
            return logits[..., :1]  # GPTModel transposes what the output layer returns: hand on as little as possible

        with self._hooks[role].armed(keep_responses):
            output = model(rows.tokens, rows.position_ids, None)
        return output, lambda output, non_loss_data=True: None


def forward_kl(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    group: dist.ProcessGroup | None,
    vocab_size: int,
    chunk_rows: int = _CHUNK_ROWS,
) -> torch.Tensor:
    """Exact KL(teacher ‖ student) of each row over a sharded vocabulary; two collectives a chunk, no gradient.

    Args:
        teacher_logits: [n, V_teacher/tp], this rank's shard.
        student_logits: [n, V_student/tp]; the two may be padded differently.
        group: the tensor-parallel group, None when the vocabulary is not sharded.
        vocab_size: columns from here on are padding in both.
        chunk_rows: rows that are in fp32 at the same time.

    Returns:
        [n], fp32 (float64 for float64 logits), in nats.
    """
    chunks = zip(teacher_logits.split(chunk_rows), student_logits.split(chunk_rows), strict=True)
    return torch.cat([_chunk_kl(t, s, group, vocab_size) for t, s in chunks])


def _chunk_kl(
    teacher: torch.Tensor, student: torch.Tensor, group: dist.ProcessGroup | None, vocab_size: int
) -> torch.Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    width, rank = student.size(1), 0 if group is None else group.rank()
    teacher = _align_columns(teacher, width, group).to(dtype)
    student = student.to(dtype)
    padding = torch.arange(rank * width, (rank + 1) * width, device=student.device) >= vocab_size
    difference = (teacher - student).masked_fill_(padding, 0.0)
    maxima = torch.stack([x.masked_fill(padding, -torch.inf).amax(-1) for x in (teacher, student)])  # [2, n]
    _all_reduce(maxima, dist.ReduceOp.MAX, group)
    teacher_exp, student_exp = (
        (x - m.unsqueeze(-1)).exp_().masked_fill_(padding, 0.0) for x, m in zip((teacher, student), maxima, strict=True)
    )
    sums = torch.stack([teacher_exp.sum(-1), student_exp.sum(-1), (teacher_exp * difference).sum(-1)])  # [3, n]
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    teacher_lse, student_lse = maxima + sums[:2].log()
    return sums[2] / sums[0] - teacher_lse + student_lse


def _align_columns(logits: torch.Tensor, width: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Return the columns [rank * width, (rank + 1) * width) of logits sharded in another width."""
    if logits.size(1) == width:
        return logits
    shards = [logits] if group is None else all_shards(logits, group)
    start = 0 if group is None else group.rank() * width
    columns = torch.cat(shards, dim=1)[:, start : start + width]
    return torch.nn.functional.pad(columns, (0, width - columns.size(1)))


def _all_reduce(tensor: torch.Tensor, op: dist.ReduceOp, group: dist.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


def load_held_out(
    path: str | Path, responses: str | Path | None, tokenizer: Tokenizer, max_tokens: int | None = None
) -> list[Prompt]:
    """Read held-out prompts with the teacher's responses to them.

    Args:
        path: JSONL of prompts.
        responses: JSONL of `{"id", "teacher_response"}`, as `megatron-tropd generate` writes it; None when the prompts
            carry their own.
        tokenizer: encodes the prompts.
        max_tokens: longest prompt.

    Raises:
        UserError: a file cannot be read, or a prompt has no response.
    """
    if responses is None:
        return load_prompts(path, tokenizer, max_tokens, require=("teacher_response",))
    prompts = load_prompts(path, tokenizer, max_tokens)
    if not Path(responses).is_file():
        raise UserError(f"evaluation.held_out_responses={responses}: no such file; {_remedy(path, responses)}")
    by_id = {str(r.get("id")): r.get("teacher_response") for r in read_records(responses)}
    missing = [prompt.id for prompt in prompts if not by_id.get(prompt.id)]
    if missing:
        raise UserError(
            f"{responses}: no teacher_response for {len(missing)} of the {len(prompts)} prompts of {path}, such as "
            f"{missing[0]!r}; {_remedy(path, responses)}"
        )
    return [replace(prompt, teacher_response=by_id[prompt.id]) for prompt in prompts]


def _remedy(path: str | Path, responses: str | Path) -> str:
    command = f"megatron-tropd generate --model teacher --field teacher_response --prompts {path} --output {responses}"
    return f"write it with `{command}` and the recipe"


def _response_tokens(prompt: Prompt, tokenizer: Tokenizer, limit: int | None) -> list[int]:
    tokens = tokenizer.encode_response(prompt.teacher_response) if prompt.teacher_response else []
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
