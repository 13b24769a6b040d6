"""The training loop: one visible call per stage, and none of a stage's logic.

    prompts -> rollout -> batch -> teacher scores -> student update -> checkpoint

Run it with `megatron-tropd train RECIPE` under torchrun, or call `train(load_recipe("tiny"))` in every process. A run
killed at any moment continues from its newest whole checkpoint; SIGTERM and Ctrl-C save one first.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_tropd.config import Recipe
from megatron_tropd.evaluation.accuracy import evaluate, training_record
from megatron_tropd.machine import preflight
from megatron_tropd.machine.determinism import make_deterministic
from megatron_tropd.machine.environment import gather
from megatron_tropd.numbers.finite_weights import check_finite
from megatron_tropd.numbers.guard import NumberGuard
from megatron_tropd.parallel.batching import pad_rollouts
from megatron_tropd.parallel.groups import on_rank_zero
from megatron_tropd.parallel.partition import Partition, split_processes
from megatron_tropd.parallel.process_groups import process_groups
from megatron_tropd.parallel.termination import TerminationFlag
from megatron_tropd.records.metrics import MetricsWriter
from megatron_tropd.records.progress import Progress, open_progress
from megatron_tropd.records.trackers import open_trackers
from megatron_tropd.reporting.provenance import record_start
from megatron_tropd.reporting.rollout_records import answer_records, sample_records
from megatron_tropd.rollout.filters import Verdicts, judge
from megatron_tropd.system.json_files import write_json
from megatron_tropd.system.run_lock import RunLock
from megatron_tropd.teacher.hook import TeacherHook
from megatron_tropd.teacher.remote import serve
from megatron_tropd.training import checkpoint, resume
from megatron_tropd.training.resume import checkpoint_folder
from megatron_tropd.training.run import Run, set_up
from megatron_tropd.training.run_teacher import build_served_teacher
from megatron_tropd.training.run_text import start_block
from megatron_tropd.training.step import StepResult, train_step
from megatron_tropd.types import Rollouts

logger = logging.getLogger(__name__)


def train(recipe: Recipe) -> dict[str, Any]:
    """Distil the teacher into the student as `recipe` says; collective over all processes.

    Returns:
        The content of the run's `summary.json`, on every rank.

    Raises:
        UserError: the recipe, a model, a tokenizer or a prompt file is wrong; nothing was trained.

    After an exception of any kind each of several processes should end: see parallel/process_groups.py.
    """
    if recipe.training.deterministic:
        make_deterministic()  # first: to look at GPUs is to start CUDA
    preflight.check(recipe, gather())
    partition = split_processes(recipe)
    if partition is not None:
        return _train_in_parts(recipe, partition)
    minutes = recipe.training.timeout_minutes
    part = process_groups(recipe.student, recipe.training.seed, timeout_minutes=minutes, role="student")
    with part as groups, RunLock() as lock:
        start = resume.prepare(recipe, groups, lock)
        if start.is_finished:
            return resume.finished_summary(recipe, start, groups)
        return _train(set_up(recipe, groups, None, start))


def _train_in_parts(recipe: Recipe, partition: Partition) -> dict[str, Any]:
    """Train on the student's ranks and serve on the teacher's."""
    try:
        seed, minutes = recipe.training.seed, recipe.training.timeout_minutes
        part = process_groups(getattr(recipe, partition.role), seed, partition, timeout_minutes=minutes)
        with part as groups, RunLock() as lock:
            # Both parts decide from the same files, before either writes any.
            start = resume.prepare(recipe, groups, None if partition.is_teacher else lock, partition)
            if start.is_finished:
                partition.meet()
                summary = resume.finished_summary(recipe, start, groups)
            elif partition.is_teacher:
                summary = serve(build_served_teacher(recipe, groups, partition), partition)
            else:
                summary = _train(set_up(recipe, groups, partition, start))
                partition.order("stop", summary=summary)
            partition.finish()
            partition.close()
            return summary
    except BaseException as error:  # torch's CheckpointException is no Exception
        partition.fail(error)
        raise


def _train(run: Run) -> dict[str, Any]:
    training, logging_config = run.recipe.training, run.recipe.logging
    last_step = min(training.steps, training.exit_step or training.steps)
    progress = open_progress(
        logging_config.progress,
        total=last_step,
        interval=logging_config.progress_interval,
        steps_done=run.state.step,
        enabled=run.reports,
    )
    if run.reports and run.state.step < last_step:
        progress.introduce(start_block(run, record_start(run.folder, run.recipe, run.state.step), last_step))
    trackers = open_trackers(run.recipe, run.folder, run.state.step) if run.reports else []
    writer = MetricsWriter(run.folder, start=run.state.step, trackers=trackers, enabled=run.reports)
    with TerminationFlag(tells=run.reports) as termination, progress:
        return _loop(run, termination, writer, progress, last_step)


def _loop(
    run: Run, termination: TerminationFlag, writer: MetricsWriter, progress: Progress, last_step: int
) -> dict[str, Any]:
    training, started = run.recipe.training, time.perf_counter()
    guard = NumberGuard(training, run.state.guard)
    if run.state.step == 0:
        _evaluate(run, writer, progress)
    for step in range(run.state.step, last_step):
        clock = _Clock(run.groups.device)
        progress.stage("rollout")
        prompts = run.draw(training.prompts_per_step)
        rollouts = run.engine.generate(prompts, run.guidance.prefixes(prompts, step), run.sampling(step))
        clock.lap("seconds_rollout")
        progress.stage("scores")
        verdicts = judge(rollouts, run.recipe.rollout)
        batch = pad_rollouts(
            rollouts,
            pad_multiple=run.pad_multiple,
            row_multiple=run.row_multiple,
            pad_id=run.tokenizer.pad_id,
            device=run.groups.device,
            dropped=verdicts.dropped,
            weights=verdicts.weights,
        )
        sizes = (training.micro_batch_size, run.max_tokens)
        scores = run.teacher.score(batch, *sizes) if run.teacher else None
        clock.lap("seconds_teacher")
        progress.stage("update")
        objective = (run.objective, run.recipe.objective)
        result = train_step(run.student, batch, scores, *objective, step, *sizes, limits=guard.limits())
        clock.lap("seconds_update")
        run.state.step, run.state.cursor = step + 1, run.source.state_dict()
        result.metrics |= guard.observe(step, result, rollouts, _models(run))
        measured = {
            **_rollout_metrics(run, rollouts, verdicts),
            **clock.laps,
            **_largest_peaks(clock.peaks, run.groups.device),
        }
        if run.reports:
            shown = (run.recipe.logging.samples, scores, verdicts.dropped)
            samples = sample_records(rollouts, result.details, run.tokenizer, *shown)
            _log(run, writer, progress, step, result, measured, samples)
        guard.enforce()
        stop = termination.agreed()
        if _is_due(run.state.step, run.recipe.evaluation.interval) or step + 1 == training.steps:
            _evaluate(run, writer, progress)
        if stop or step + 1 == last_step or _is_due(run.state.step, run.recipe.checkpoint.save_interval):
            progress.stage("saving")
            _save(run)
        if stop:
            saved = "%s: saved after step %d; run the same command to continue"
            logger.warning(saved, termination.reason, run.state.step)
            break
    writer.close(finished=run.state.step >= training.steps)
    return _summarise(run, time.perf_counter() - started)


def _models(run: Run) -> dict[str, list[torch.nn.Module]]:
    """Return the models whose weights are on these ranks' devices."""
    models = {"student": run.student.modules}
    if isinstance(run.teacher, TeacherHook) and not run.teacher.offload:
        models["teacher"] = run.teacher.chunks
    return models


class _Clock:
    """Seconds since the last lap, and the most memory that tensors took in it; on the CPU, what the process has then.

    Waits for the device, so that a stage pays for its own work.
    """

    def __init__(self, device: torch.device):
        self.laps: dict[str, float] = {}
        self.peaks: dict[str, float] = {}  # GB (1e9 bytes) of this rank
        self._on_cuda = device.type == "cuda"  # the CPU's allocator keeps no account
        self._start()

    def lap(self, name: str) -> None:
        torch.cuda.synchronize()
        self.laps[name] = time.perf_counter() - self._last
        taken = torch.cuda.max_memory_allocated() if self._on_cuda else psutil.Process().memory_info().rss
        self.peaks[name.replace("seconds_", "memory_") + "_gb"] = taken / 1e9
        self._start()

    def _start(self) -> None:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self._last = time.perf_counter()


def _largest_peaks(peaks: dict[str, float], device: torch.device) -> dict[str, float]:
    """Return the peaks of the fullest rank, in one small collective; a teacher's own ranks are not among them."""
    largest = torch.tensor(list(peaks.values()), dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return dict(zip(peaks, largest.tolist(), strict=True))


def _is_due(steps_done: int, interval: int) -> bool:
    return interval > 0 and steps_done % interval == 0


def _log(
    run: Run,
    writer: MetricsWriter,
    progress: Progress,
    step: int,
    result: StepResult,
    measured: dict[str, float],
    samples: list[dict[str, Any]],
) -> None:
    """Write and show a step's numbers and samples, on the rank that does; `measured`: beside those of the result."""
    seconds = sum(value for name, value in measured.items() if name.startswith("seconds_"))
    rate = measured.pop("num_sequence_tokens") / seconds
    metrics: dict[str, float | list[int]] = {**measured, **result.metrics}
    metrics |= {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
    metrics |= {"num_loss_tokens": result.num_loss_tokens, "tokens_per_second": rate}
    metrics["prefix_fraction"] = run.guidance.fraction(step)
    progress.step(step, writer.write(step, metrics), samples)
    writer.write_samples(step, samples)


def _rollout_metrics(run: Run, rollouts: Rollouts, verdicts: Verdicts) -> dict[str, float]:
    """Reduce lengths, finish reasons and what the filters found over the data-parallel ranks, in one collective."""
    reasons = ("eos", "stop", "length", "prefix")
    written = sum(map(len, rollouts.logprobs))  # tokens of the student's own
    numbers = {f"finish_{reason}": rollouts.finish_reasons.count(reason) for reason in reasons}
    if verdicts.counts:
        numbers |= {f"filtered_{name}": count for name, count in verdicts.counts.items()}
        numbers["filtered_fraction"] = verdicts.filtered
    local = [len(rollouts), sum(rollouts.lengths), written, sum(rollouts.prefix_lengths), *numbers.values()]
    total = torch.tensor(local, dtype=torch.float64, device=run.groups.device)
    dist.all_reduce(total, group=run.groups.dp)
    samples, sequence_tokens, response_tokens, prefix_tokens, *counts = total.tolist()
    return {
        "num_sequence_tokens": sequence_tokens,
        "generated_tokens": response_tokens,
        "response_length": response_tokens / samples,
        "prefix_length": prefix_tokens / samples,
        **{name: count / samples for name, count in zip(numbers, counts, strict=True)},
    }


def _evaluate(run: Run, writer: MetricsWriter, progress: Progress) -> None:
    """Measure accuracy on the recipe's problems and divergence on its held-out prompts, as far as it names them."""
    progress.stage("evaluation")
    record: dict[str, Any] = {"step": run.state.step}
    graded: list[dict[str, Any]] = []
    if run.problems:
        config = run.recipe.evaluation
        result = evaluate(
            run.engine,
            run.problems,
            config,
            run.groups,
            rollout=run.recipe.rollout,
            seed=run.recipe.training.seed,
            tell=progress.stage,
            on_nan=run.recipe.training.on_nan,
        )
        record |= training_record(result)
        graded = result["samples"]
    if run.held_out:
        record |= run.held_out.measure(run.recipe.training.on_nan)
    if len(record) > 1:
        run.state.evaluations.append(record)
        if run.reports:
            writer.write_evaluation(record)
            progress.evaluation(record)
            writer.write_answers(answer_records(record["step"], graded, run.problems, run.recipe.logging.answers))


def _save(run: Run) -> None:
    run.student.gather_parameters(wait=True)
    check_finite(
        run.student.modules,
        "student",
        f"after step {run.state.step - 1}: no checkpoint was written, and the newest one is as it was",
        "Where the updates made them so, lower training.lr.",
    )
    path = checkpoint.save(
        checkpoint_folder(run.recipe),
        run.student,
        run.state,
        run.hf_path,
        run.folder / "recipe.yaml",
        run.recipe.checkpoint.keep,
        run.finish_folder,
    )
    logger.info("saved %s", path)


def _summarise(run: Run, seconds: float) -> dict[str, Any]:
    """Write summary.json on the reporting rank and return it on all."""
    summary = {
        "steps": run.state.step,
        "finished": run.state.step >= run.recipe.training.steps,
        "seconds": seconds,
        "evaluations": run.state.evaluations,
        "skipped_steps": run.state.guard["skipped"],
        "checkpoint": str(checkpoint_folder(run.recipe) / f"step_{run.state.step:06d}"),
        **{name: getattr(run.recipe.student, name) for name in _LAYOUT_KEYS},
        "data_parallel_size": run.groups.dp_size,
    }

    on_rank_zero(lambda: write_json(run.folder / "summary.json", summary))
    return summary


_LAYOUT_KEYS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
)
