"""TeacherHook: a frozen teacher's scores of a batch, through a hook on its output layer in a forward-only schedule.

The logits shard `[s, b, V/tp]` becomes sampled log-prob, top-k and entropy inside the forward pass of its micro-batch;
full logits are neither gathered nor kept. It does not generate and has no optimizer.

    hook = TeacherHook(groups, vocab_size=tokenizer.vocab_size, topk=64)
    hook.attach(teacher_chunks)
    scores = hook.score(batch, micro_batch_size=4)      # TeacherScores on the last stage, None elsewhere
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_tropd.batching import microbatches
from megatron_tropd.kernels import vocab_parallel_logprobs, vocab_parallel_topk
from megatron_tropd.megatron_compat import run_schedule, unwrap_model
from megatron_tropd.output_hook import OutputHook
from megatron_tropd.parallel import ParallelGroups
from megatron_tropd.types import LOSS_NONE, TeacherScores, TrainingBatch


class TeacherHook:
    """Scores batches with a frozen Megatron model; `attach` freezes it, `detach` takes the hook off."""

    def __init__(
        self,
        groups: ParallelGroups,
        vocab_size: int,
        topk: int = 64,
        temperature: float = 1.0,
        with_entropy: bool = True,
        implementation: str = "auto",
    ):
        """Describe what to score.

        Args:
            groups: the teacher's process groups.
            vocab_size: true vocabulary size, padding left out.
            topk: number of most probable tokens; 0 for none.
            temperature: divides the logits, as in the student's loss.
            with_entropy: also return the entropy (no further pass).
            implementation: of the kernels.
        """
        self.groups = groups
        self.vocab_size = vocab_size
        self.topk = min(topk, vocab_size)
        self.temperature = temperature
        self.with_entropy = with_entropy
        self.implementation = implementation
        self.chunks: list[torch.nn.Module] = []
        self._hook: OutputHook | None = None
        self._scores: TeacherScores | None = None

    def attach(self, chunks: list[torch.nn.Module]) -> TeacherHook:
        """Freeze the teacher's model chunks and hook their output layer."""
        if self._hook is not None:
            raise RuntimeError("this TeacherHook is attached already; call detach() first")
        self.chunks = [unwrap_model(chunk) for chunk in chunks]
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._hook = OutputHook(self.chunks)
        return self

    def detach(self) -> None:
        """Take the hook off; the teacher stays frozen."""
        if self._hook is not None:
            self._hook.remove()
        self._hook, self.chunks = None, []

    def score(self, batch: TrainingBatch, micro_batch_size: int) -> TeacherScores | None:
        """Score every row of `batch` [b, s].

        Collective over the teacher's tensor- and pipeline-parallel ranks. The batch is the same on all of them.

        Returns:
            TeacherScores of the whole batch on the last pipeline stage, None on the others. Rows and positions without
            a loss hold zeros.
        """
        if self._hook is None:
            raise RuntimeError("attach(model) before score(batch)")
        assert not any(p.requires_grad for c in self.chunks for p in c.parameters()), "the teacher must stay frozen"
        with torch.no_grad():
            parts = run_schedule(
                self.groups,
                self._forward_step,
                microbatches(batch, micro_batch_size),
                self.chunks,
                seq_length=batch.tokens.size(1),
                micro_batch_size=micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return _concatenate(parts) if self.groups.is_last_stage else None

    def _forward_step(self, data_iterator: Iterator[TrainingBatch], model: torch.nn.Module):
        batch = next(data_iterator)
        with self._hook.armed(lambda logits: self._score_logits(logits, batch)):
            output = model(batch.tokens, batch.position_ids, None)
        return output, self._collect

    def _collect(self, output: torch.Tensor, non_loss_data: bool = True) -> TeacherScores:
        scores, self._scores = self._scores, None
        return scores

    def _score_logits(self, logits: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Turn logits [s, b, V/tp] into this micro-batch's scores; hand a [s, b, 1] output on to GPTModel."""
        labels = batch.labels.t().unsqueeze(-1)  # [s, b, 1]
        mask = (batch.loss_kind != LOSS_NONE).t()  # [s, b]
        options = {"temperature": self.temperature, "mask": mask, "implementation": self.implementation}
        logprobs, entropy = vocab_parallel_logprobs(
            logits, labels, self.groups.tp, self.vocab_size, with_entropy=self.with_entropy, **options
        )
        topk_shape = (*logprobs.shape[:2], 0)
        topk_logprobs, topk_ids = logits.new_zeros(topk_shape, dtype=torch.float32), labels.new_zeros(topk_shape)
        if self.topk:
            topk_logprobs, topk_ids = vocab_parallel_topk(logits, self.topk, self.groups.tp, self.vocab_size, **options)
        self._scores = TeacherScores(
            logprobs=logprobs.squeeze(-1).t(),
            topk_ids=topk_ids.transpose(0, 1),
            topk_logprobs=topk_logprobs.transpose(0, 1),
            entropy=None if entropy is None else entropy.t(),
        )
        return logprobs


def _concatenate(parts: list[TeacherScores]) -> TeacherScores:
    return TeacherScores(
        logprobs=torch.cat([p.logprobs for p in parts]),
        topk_ids=torch.cat([p.topk_ids for p in parts]),
        topk_logprobs=torch.cat([p.topk_logprobs for p in parts]),
        entropy=None if parts[0].entropy is None else torch.cat([p.entropy for p in parts]),
    )
