"""Checks that train: rounds of generate, score and update with small models, what they leave in memory, a checkpoint.

round_ = Round(recipe, groups)      # builds the models; collective
round_.check(), round_.checkpoint_check(folder)
"""

from __future__ import annotations

import dataclasses
import gc
import math
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_tropd.config import Recipe
from megatron_tropd.doctor.models import (
    CONTEXT,
    VOCAB,
    NumberTokenizer,
    clip_layout,
    hf_config,
    random_model,
    random_prompts,
)
from megatron_tropd.doctor.report import Check
from megatron_tropd.models.convert import load_checkpoint_weights, save_checkpoint_weights
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.objective.objectives import build_objective
from megatron_tropd.parallel.batching import pad_rollouts
from megatron_tropd.parallel.groups import ParallelGroups, build_groups, on_rank_zero
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.teacher.exchange import Exchange
from megatron_tropd.teacher.hook import TeacherHook
from megatron_tropd.training.step import StepResult, train_step
from megatron_tropd.training.student import build_student
from megatron_tropd.types import LOSS_STUDENT, Rollouts, Sampling, TrainingBatch

ROUNDS = 3
_PROMPTS, _SAMPLES, _NEW_TOKENS, _PREFIX = 4, 2, 24, 4
_MICRO_BATCH, _PACKED_TOKENS = 2, 128
_SLACK_BYTES = 1 << 20  # what the second and third round may add to memory: allocators and caches of lengths
# Largest mean difference, in nats, between the log-probs of rollouts and of training's own forward pass.
_DRIFT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
_FP8_DRIFT = 5e-1
_STAGES = ("generate", "score", "update")


class Round:
    """A small student and teacher in the recipe's dtypes and in its layouts, clipped to the processes at hand."""

    def __init__(self, recipe: Recipe, groups: ParallelGroups):
        """Build both models; collective.

        Args:
            recipe: its student, teacher, rollout, objective and training sections are used.
            groups: of the clipped student's layout.
        """
        self.recipe, self.groups = recipe, groups
        self.model = clip_layout(recipe.student, groups.world_size)
        self.objective = build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
        self.config = hf_config(self.model)
        modules = random_model(self.config, self.model, groups, training=True)
        training = dataclasses.replace(recipe.training, steps=ROUNDS, lr_warmup_steps=0)
        self.student = build_student(modules, training, groups, VOCAB)
        self.pad_multiple = groups.token_multiple(self.model)
        self.teacher = self._teacher() if self.objective.needs_teacher else None
        rollout = dataclasses.replace(recipe.rollout, max_batch_size=_PROMPTS * _SAMPLES, kv_cache_gb=None)
        self.tokenizer = NumberTokenizer()
        self.engine = RolloutEngine(modules, self.tokenizer, groups, rollout, max_sequence_length=CONTEXT)

    def _teacher(self) -> TeacherHook:
        model = dataclasses.replace(clip_layout(self.recipe.teacher, self.groups.world_size), recompute=None)
        groups = build_groups(model, self.groups)
        self.pad_multiple = math.lcm(self.pad_multiple, groups.token_multiple(model))
        config, objective = self.recipe.objective, self.objective
        exchange = None
        if groups is not self.groups:
            exchange = Exchange(self.groups, groups, token_multiple=groups.token_multiple(model))
        teacher = TeacherHook(
            groups,
            vocab_size=VOCAB,
            topk=objective.topk,
            temperature=config.temperature,
            with_hidden=objective.divergence is not None,
            implementation=config.kernel,
            exchange=exchange,
            offload=model.offload,
        )
        teacher.attach(random_model(hf_config(model), model, groups, training=False, seed=7))
        if objective.divergence is not None:
            weight = teacher.output_weight(self.student.vocabulary_width)
            self.student.divergence = Divergence(
                objective.divergence,
                weight,
                self.groups.tp,
                VOCAB,
                beta=config.beta,
                temperature=config.temperature,
                implementation=config.kernel,
            )
        return teacher

    def describe(self) -> str:
        """Return the models' sizes in short."""
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        return f"{layers} layers of width {width}, objective {self.recipe.objective.name}"

    def check(self) -> Check:
        """Run the rounds; wrong where numbers are not finite, rollouts are not the model's own, or memory grows."""
        name, seconds, drift = "generate, score, update", dict.fromkeys(_STAGES, 0.0), 0.0
        memory, resident = [], []
        with _collector_off():
            for step in range(ROUNDS):
                rollouts, batch, result = self._run(step, seconds)
                drift = max(drift, self._drift(batch, result))
                wrong = self._not_finite(result)
                del rollouts, batch, result
                memory.append(memory_bytes(self.groups.device))
                resident.append(psutil.Process().memory_info().rss)
                if wrong:
                    return Check(name, "wrong", f"round {step + 1}: {wrong}", "try student.dtype=float32")
        numbers = {"memory_first": memory[0], "memory_last": memory[-1], "drift": drift, **seconds}
        numbers |= {"resident_first": resident[0], "resident_last": resident[-1]}
        grown = memory[-1] - memory[0]
        measured = f"{memory[0] / 1e6:.1f} MB after the first round, {memory[-1] / 1e6:.1f} MB after the third"
        if grown > _SLACK_BYTES:
            detail = f"memory grows by {grown / (ROUNDS - 1) / 1e6:.1f} MB a round: {measured}"
            return Check(
                name,
                "wrong",
                detail,
                "a long run would run out of it; report it with the versions above",
                numbers=numbers,
            )
        bound = _FP8_DRIFT if self.model.fp8 else _DRIFT[self.model.dtype]
        if not drift <= bound:
            detail = f"log-probs of rollouts differ from training's by {drift:.3g} nats on average, bound {bound:g}"
            return Check(
                name, "wrong", detail, "compare rollout.attention=plain, then rollout.engine=static", numbers=numbers
            )
        last = ", ".join(f"{stage} {second:.2f} s" for stage, second in seconds.items())
        detail = f"{self.model.dtype}, {measured}; drift {drift:.1e} nats; {last}"
        return Check(name, "ok", detail, numbers=numbers)

    def _run(self, step: int, seconds: dict[str, float]) -> tuple[Rollouts, TrainingBatch, StepResult]:
        """Run one round; `seconds` by stage are overwritten, so that the last round's stay, which compiles nothing."""
        training, clock = self.recipe.training, time.perf_counter()

        def lap(stage: str) -> None:
            nonlocal clock
            torch.cuda.synchronize()
            seconds[stage], clock = time.perf_counter() - clock, time.perf_counter()

        prompts = random_prompts(self.groups, _PROMPTS)
        rollouts = self.engine.generate(prompts, self._prefixes(), self._sampling(step))
        lap("generate")
        batch = pad_rollouts(
            rollouts,
            pad_multiple=self.pad_multiple,
            row_multiple=_MICRO_BATCH * self.groups.micro_batch_multiple,
            pad_id=self.tokenizer.pad_id,
            device=self.groups.device,
        )
        sizes = (_MICRO_BATCH, _PACKED_TOKENS if training.max_tokens_per_micro_batch else None)
        scores = self.teacher.score(batch, *sizes) if self.teacher else None
        lap("score")
        result = train_step(self.student, batch, scores, self.objective, self.recipe.objective, step, *sizes)
        lap("update")
        return rollouts, batch, result

    def _prefixes(self) -> list[list[int]]:
        """Return what responses begin with: written by a teacher, whole, half of the time or never."""
        if not self.objective.needs_rollout:
            return [[5, 6, 7, self.tokenizer.eos_id]] * _PROMPTS
        prefix = list(range(5, 5 + _PREFIX)) if self.objective.uses_guidance else []
        return [prefix if place % 2 else [] for place in range(_PROMPTS)]

    def _sampling(self, step: int) -> Sampling:
        return Sampling(
            samples_per_prompt=_SAMPLES if self.objective.needs_rollout else 1,
            max_new_tokens=_NEW_TOKENS,
            temperature=self.recipe.objective.temperature,  # so that log-probs compare
            seed=self.recipe.training.seed,
            step=step,
        )

    def _drift(self, batch: TrainingBatch, result: StepResult) -> float:
        """Return the mean difference between rollouts' log-probs and training's; 0 off the last stage."""
        if result.details is None or not self.objective.needs_rollout:
            return 0.0
        written = batch.loss_kind == LOSS_STUDENT
        difference = (result.details.student_logprobs - batch.old_logprobs).abs()[written]
        return float(difference.mean())

    def _not_finite(self, result: StepResult) -> str | None:
        if result.problem in (None, "overflow"):  # float16 looks for its loss scale in this way
            return None
        loss = result.metrics.get("loss", 0.0)
        return f"not finite: {result.problem}; the loss is {loss:g} and the gradient's norm {result.grad_norm:g}"

    def checkpoint_check(self, parent: Path) -> Check:
        """Write the student's weights under `parent`, wipe them, read them back and compare bits; collective."""
        name = "checkpoint"
        folder = [_make_folder(parent) if self.groups.rank == 0 else None]
        dist.broadcast_object_list(folder, src=0)
        path = folder[0]
        assert path is not None  # rank 0 sent it
        if isinstance(path, str):
            return Check(name, "wrong", path, "set checkpoint.dir to a folder that can be written, with room")
        try:
            self.student.gather_parameters(wait=True)
            before = [p.detach().clone() for module in self.student.modules for p in module.parameters()]
            started = time.perf_counter()
            on_rank_zero(lambda: self.config.save_pretrained(path / "config"))
            save_checkpoint_weights(self.student.modules, path / "weights", path / "config")
            written = time.perf_counter()
            with torch.no_grad():
                for parameter in (p for module in self.student.modules for p in module.parameters()):
                    parameter.zero_()
            load_checkpoint_weights(self.student.modules, path / "weights")
            read = time.perf_counter()
        finally:
            if self.groups.rank == 0:
                shutil.rmtree(path, ignore_errors=True)
        return self._compare(name, parent, before, written - started, read - written)

    def _compare(self, name: str, parent: Path, before: list[torch.Tensor], writing: float, reading: float) -> Check:
        after = [p for module in self.student.modules for p in module.parameters()]
        different = sum(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        numbers = {"write_seconds": writing, "read_seconds": reading}
        if different:
            detail = f"{different} of {len(after)} weights are not what was written to {parent}"
            return Check(name, "wrong", detail, "checkpoint.dir must be one folder for all nodes", numbers=numbers)
        detail = f"equal to the bit; written in {writing:.2f} s, read in {reading:.2f} s, in {parent}"
        return Check(name, "ok", detail, numbers=numbers)


def _make_folder(parent: Path) -> Path | str:
    """Make a temporary folder; return it, or why there is none."""
    try:
        return Path(tempfile.mkdtemp(prefix=".doctor-", dir=parent))
    except OSError as error:
        return f"no folder can be made in {parent} ({error.strerror})"


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep Python from collecting cycles: it cannot see a GPU's memory, and would hide on a CPU what leaks there."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def memory_bytes(device: torch.device) -> int:
    """Return the bytes of tensors that are alive: on CUDA as its allocator counts, on the CPU all that Python knows."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu" and thing.layout is torch.strided:
            storage = _storage(thing)
            if storage is not None:
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()
    except (RuntimeError, NotImplementedError):  # a subclass that has none
        return None
