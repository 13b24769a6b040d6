"""TeacherHook: scores a batch with a frozen teacher, by a hook on its output layer in a forward-only schedule.

The logits shard `[s, b, V/tp]` becomes sampled log-prob, top-k and entropy inside the forward pass of its micro-batch;
full logits are neither gathered nor kept. It does not generate and has no optimizer.

    hook = TeacherHook(groups, vocab_size=tokenizer.vocab_size, topk=64)
    hook.attach(teacher_chunks)
    scores = hook.score(batch, micro_batch_size=4)      # TeacherScores on the last stage, None elsewhere

With an `exchange` batches come from a student of another layout, and scores go back to its ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_tropd.kernels import recut_shards, vocab_parallel_logprobs, vocab_parallel_topk
from megatron_tropd.mcore.compat import run_schedule, unwrap_model
from megatron_tropd.mcore.output_hook import OutputHook
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.parallel.micro_batches import split_batch
from megatron_tropd.teacher.exchange import Exchange
from megatron_tropd.teacher.score_format import ScoreFormat
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.types import LOSS_NONE, TeacherScores, TrainingBatch

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_Arm = Callable[[TrainingBatch], AbstractContextManager[None]]


class TeacherHook:
    """Scores batches with a frozen Megatron model; `attach` freezes it, `detach` takes the hook off."""

    def __init__(
        self,
        groups: ParallelGroups,
        vocab_size: int,
        topk: int = 64,
        temperature: float = 1.0,
        with_entropy: bool = True,
        with_hidden: bool = False,
        implementation: str = "auto",
        exchange: Exchange | None = None,
        offload: bool = False,
        end: EndOfText | None = None,
    ):
        """Describe what to score.

        Args:
            groups: the teacher's process groups.
            vocab_size: true vocabulary size, padding left out.
            topk: number of most probable tokens; 0 for none.
            temperature: divides the logits, as in the student's loss.
            with_entropy: also return the entropy (no further pass).
            with_hidden: also return the hidden states, for objectives over the whole vocabulary.
            implementation: of the kernels.
            exchange: with the student, where its layout is another or its ranks are.
            offload: keep the weights in (pinned) host memory between passes.
            end: end-of-text ids that are one event.
        """
        self.groups = groups
        self.exchange = exchange
        self.vocab_size = vocab_size
        self.topk = min(topk, vocab_size)
        self.temperature = temperature
        self.with_entropy = with_entropy
        self.with_hidden = with_hidden
        self.implementation = implementation
        self.offload = offload
        self.end = end or EndOfText()
        self.chunks: list[GPTModel] = []
        self._host: dict[torch.nn.Parameter, torch.Tensor] = {}  # offloaded weights
        self._hook: OutputHook | None = None
        self._part: torch.Tensor | None = None

    def attach(self, chunks: list[GPTModel]) -> TeacherHook:
        """Freeze the teacher's model chunks and hook their output layer."""
        if self._hook is not None:
            raise RuntimeError("this TeacherHook is attached already; call detach() first")
        self.chunks = [unwrap_model(chunk) for chunk in chunks]
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._hook = OutputHook(self.chunks)
        if self.offload:
            for parameter in (p for chunk in self.chunks for p in chunk.parameters()):
                host = parameter.data.to("cpu", copy=True)
                self._host[parameter] = host.pin_memory() if parameter.is_cuda else host
            self._empty()
        return self

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Within the context offloaded weights are on the device; `score` and `hidden_states` enter it themselves."""
        if not self._host or self._is_loaded():
            yield
            return
        for parameter, host in self._host.items():
            # A copy, also where device and host are one: what is emptied afterwards must not be the host's own.
            parameter.data = host.to(self.groups.device, non_blocking=True, copy=True)
        try:
            yield
        finally:
            self._empty()

    def _is_loaded(self) -> bool:
        return next(iter(self._host)).numel() > 0

    def _empty(self) -> None:
        for parameter in self._host:
            parameter.data = parameter.data.new_empty(0)

    def detach(self) -> None:
        """Take the hook off; the teacher stays frozen, its weights come back to the device."""
        if self._hook is not None:
            self._hook.remove()
        for parameter, host in self._host.items():
            parameter.data = host.to(self.groups.device)
        self._hook, self.chunks, self._host = None, [], {}

    def score(
        self, batch: TrainingBatch | None, micro_batch_size: int, max_tokens: int | None = None
    ) -> TeacherScores | None:
        """Score every row of `batch` [b, s].

        Collective over all ranks of the student's replica, and of the whole job where the teacher's layout is another.
        The batch is the student replica's, the same on all its ranks.

        Args:
            batch: the student replica's; None on ranks without a part of the student.
            micro_batch_size: rows a forward pass.
            max_tokens: pack sequences into micro-batches of at most this many tokens instead; None: no packing.

        Returns:
            TeacherScores of the whole batch on the student's last pipeline stage, None on the others. Rows and
            positions without a loss hold zeros.
        """
        format = self._format()
        if self.exchange is None:
            packed = self._run(batch, micro_batch_size, max_tokens, self._scoring)
        else:
            share = self.exchange.distribute(batch, micro_batch_size)
            payload = self._run(share.batch, micro_batch_size, max_tokens, self._scoring)
            packed = self.exchange.collect(payload, share, format.channels, torch.int32)
        return None if packed is None else format.unpack(packed)

    def _format(self) -> ScoreFormat:
        config = self.chunks[-1].config if self.chunks else None
        hidden = (config.hidden_size, config.params_dtype) if config and self.with_hidden else ()
        return ScoreFormat(self.topk, self.with_entropy, *hidden)

    def hidden_states(self, batch: TrainingBatch | None, micro_batch_size: int) -> torch.Tensor | None:
        """Return the output layer's input [b, s, h] at tokens with a loss, zeros elsewhere; where `score` returns.

        For objectives and measurements over the whole vocabulary: `output_weight` is the other factor of the logits.
        """
        if self.exchange is None:
            hidden = self._run(batch, micro_batch_size, None, self._reading_hidden)
            return None if hidden is None or batch is None else hidden * (batch.loss_kind != LOSS_NONE).unsqueeze(-1)
        share = self.exchange.distribute(batch, micro_batch_size)
        payload = self._run(share.batch, micro_batch_size, None, self._reading_hidden)
        config = self.chunks[-1].config
        return self.exchange.collect(payload, share, config.hidden_size, config.params_dtype)

    def output_weight(self, width: int) -> torch.Tensor | None:
        """Return the output layer [width, h] in the student's vocabulary shards, on the student's last stage.

        Collective over the whole job. Where the teacher's own shards are the same, and stay on the device, it is the
        weight itself.

        Args:
            width: columns of the student's vocabulary shard.
        """
        last, weight = self.chunks[-1], None
        with self.weights():
            if self.groups.is_last_stage:
                weight = last.shared_embedding_or_output_weight() if last.share_embeddings_and_output_weights else None
                weight = (last.output_layer.weight if weight is None else weight).detach()
            if self.exchange is not None:
                sizes = (width, last.config.hidden_size, last.config.params_dtype)
                return self.exchange.reshard_output_weight(weight, *sizes)
            if weight is None:
                return None
            if self.groups.tp_size > 1 and weight.size(0) != width:  # the vocabularies are padded differently
                return recut_shards(weight, width, self.groups.tp, dim=0)
            return weight.clone() if self.offload else weight

    def _run(
        self,
        batch: TrainingBatch | None,
        micro_batch_size: int,
        max_tokens: int | None,
        arm: _Arm,
    ) -> torch.Tensor | None:
        """Run the teacher's schedule; return what it keeps of each token, [b, s, c], on the last stage alone.

        Args:
            batch: the teacher replica's.
            micro_batch_size: rows a forward pass.
            max_tokens: as in `score`.
            arm: micro-batch -> the context in which its forward pass hands the output layer's part to `_keep`.
        """
        if self._hook is None:
            raise RuntimeError("attach(model) before score(batch)")
        assert batch is not None  # a rank without the student's batch gets its teacher replica's from an exchange
        assert not any(p.requires_grad for c in self.chunks for p in c.parameters()), "the teacher must stay frozen"
        multiple = self.groups.token_multiple(self.chunks[0].config)
        split = split_batch(batch, self.groups, micro_batch_size, max_tokens, multiple)
        with torch.no_grad(), self.weights():
            parts = run_schedule(
                self.groups,
                partial(self._forward_step, arm=arm),
                split.batches,
                self.chunks,
                seq_length=split.seq_length,
                micro_batch_size=split.micro_batch_size,
                forward_only=True,
                collect_non_loss_data=True,
            )
        return split.join(parts) if parts else None

    def _forward_step(
        self, data_iterator: Iterator[TrainingBatch], model: GPTModel, *, arm: _Arm
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(data_iterator)
        with arm(batch):
            output = model(batch.tokens, batch.position_ids, None, packed_seq_params=batch.packed_seq_params)
        return output, self._collect

    def _scoring(self, batch: TrainingBatch) -> AbstractContextManager[None]:
        assert self._hook is not None  # `_run` asked
        return self._hook.armed(lambda logits, hidden: self._keep(self._score_logits(logits, hidden, batch), logits))

    def _reading_hidden(self, batch: TrainingBatch) -> AbstractContextManager[None]:
        assert self._hook is not None  # `_run` asked
        return self._hook.replaced(lambda hidden, weight: self._keep(hidden.transpose(0, 1), hidden))

    def _keep(self, part: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        self._part = part
        return output[..., :1]  # GPTModel transposes what the output layer returns: hand on as little as possible

    def _collect(self, output: torch.Tensor, non_loss_data: bool = True) -> Any:
        part, self._part = self._part, None
        return part

    def _score_logits(self, logits: torch.Tensor, hidden: torch.Tensor, batch: TrainingBatch) -> torch.Tensor:
        """Turn logits [s, b, V/tp] into this micro-batch's scores, packed [b, s, c]."""
        labels = batch.labels.t().unsqueeze(-1)  # [s, b, 1]
        mask = (batch.loss_kind != LOSS_NONE).t()  # [s, b]
        gathered, entropy = vocab_parallel_logprobs(
            logits,
            self.end.extend(labels),
            self.groups.tp,
            self.vocab_size,
            temperature=self.temperature,
            with_entropy=self.with_entropy,
            mask=mask,
            implementation=self.implementation,
        )
        logprobs = self.end.merge(gathered, labels)
        topk_shape = (*logprobs.shape[:2], 0)
        topk_logprobs, topk_ids = logits.new_zeros(topk_shape, dtype=torch.float32), labels.new_zeros(topk_shape)
        if self.topk:
            topk_logprobs, topk_ids = vocab_parallel_topk(
                logits,
                self.topk,
                self.groups.tp,
                self.vocab_size,
                temperature=self.temperature,
                mask=mask,
                implementation=self.implementation,
            )
            topk_logprobs, topk_ids = self.end.merge_topk(topk_logprobs, topk_ids, gathered[..., 1:])
        assert self._hook is not None  # this is called by it
        scores = TeacherScores(
            logprobs=logprobs.squeeze(-1).t(),
            topk_ids=topk_ids.transpose(0, 1),
            topk_logprobs=topk_logprobs.transpose(0, 1),
            entropy=None if entropy is None else entropy.t(),
            hidden=self._hook.whole(hidden).transpose(0, 1) if self.with_hidden else None,
        )
        return self._format().pack(scores)
