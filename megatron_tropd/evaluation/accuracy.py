"""Measures a model's accuracy on problems with known answers: generates, grades (grading/grader.py) and adds up.

result = evaluate(engine, problems, recipe.evaluation, groups, rollout=recipe.rollout)
result["accuracy"], result["accuracy_low"], result["accuracy_high"], result["pass_at_k"]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import DataConfig, EvaluationConfig, RolloutConfig
from megatron_tropd.errors import UserError
from megatron_tropd.evaluation.intervals import measure
from megatron_tropd.grading.grader import Grader
from megatron_tropd.prompts.source import PromptEncoder, evaluation_data, load_prompts
from megatron_tropd.rollout.decoding import make_sampling
from megatron_tropd.rounding import ceil_div
from megatron_tropd.types import Prompt, Rollouts

if TYPE_CHECKING:
    from megatron_tropd.parallel.groups import ParallelGroups
    from megatron_tropd.rollout.engine import RolloutEngine


_LENGTH_REMEDY = "lower evaluation.max_new_tokens (default: rollout.max_new_tokens), which leaves more of the context"


def load_problems(
    path: str | Path | list[str],
    tokenizer: PromptEncoder,
    max_tokens: int | None = None,
    data: DataConfig | None = None,
) -> list[Prompt]:
    """Read prompt files whose every row has an `answer`; see prompts.load_prompts."""
    return load_prompts(
        path,
        tokenizer,
        max_tokens,
        require=("answer",),
        key="evaluation.problems",
        data=evaluation_data(data),
        length_remedy=_LENGTH_REMEDY,
    )


def evaluate(
    engine: RolloutEngine,
    problems: list[Prompt],
    config: EvaluationConfig,
    groups: ParallelGroups,
    *,
    rollout: RolloutConfig,
    seed: int = 0,
    tell: Callable[[str], None] | None = None,
    role: str = "student",
    on_nan: str = "stop",
) -> dict[str, Any]:
    """Answer every problem `config.samples` times and count the right answers; collective over all ranks.

    Problems are distributed over the data-parallel ranks, one rank of each replica grades, and the results are shared,
    so every rank returns the same under every layout. Sampling keys that `config` does not set are those of `rollout`,
    except for the temperature; the engine generates rollout.max_batch_size responses at a time. Those drawn
    from logits that are not finite are refused (`role` is the model's), or warned of with on_nan=skip. `tell` gets the
    progress of this replica as text; without it, rank 0 shows a bar on a terminal.

    Returns:
        what `summarise` returns.

    Raises:
        UserError: on every rank, if an answer can never be met or the grading process does not start.
    """
    from megatron_tropd.numbers.guard import check_responses

    own = {name: getattr(config, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "stop")}
    sampling = make_sampling(rollout, seed, samples_per_prompt=config.samples, **own)
    mine = problems[groups.dp_rank :: groups.dp_size]
    chunk = max(1, rollout.max_batch_size // config.samples)
    share, arbitrary = _Share(config, problems), 0
    hides = tell is not None or dist.get_rank() > 0  # else the bar is there on a terminal
    grades = all(group.rank() == 0 for group in (groups.mp, groups.cp))
    with (
        share,
        tqdm(total=len(mine), desc="evaluate", unit="problem", disable=True if hides else None) as bar,
    ):
        for start in range(0, ceil_div(len(problems), groups.dp_size), chunk):  # as often on every rank
            batch = mine[start : start + chunk]
            rollouts = engine.generate(batch, [[] for _ in batch], sampling)
            arbitrary += check_responses(rollouts, role, on_nan)
            if grades:
                share.grade(rollouts)
            bar.update(len(batch))
            bar.set_postfix(accuracy=f"{share.accuracy:.3f}", refresh=False)
            if tell is not None:
                tell(f"evaluation {start + len(batch):,}/{len(mine):,}")
    samples, exceeded = _gather(share, groups)
    result = summarise(samples, config.samples, exceeded)
    return {**result, "problems_not_finite": arbitrary} if arbitrary else result


class _Share:
    """The responses that one replica grades; a failure is kept until all ranks can raise it together."""

    def __init__(self, config: EvaluationConfig, problems: list[Prompt]):
        self.samples: list[dict[str, Any]] = []
        self.failure: str | None = None
        self._grader = Grader(config.grader, config.answer_pattern, config.grader_timeout)
        for problem in problems:
            assert problem.answer is not None  # load_problems asks for one
            self._grader.check_answer(problem.answer, problem.row or f"problem {problem.id}")

    @property
    def accuracy(self) -> float:
        return sum(sample["correct"] for sample in self.samples) / max(1, len(self.samples))

    @property
    def exceeded(self) -> int:
        return self._grader.exceeded

    def grade(self, rollouts: Rollouts) -> None:
        try:
            self.samples += _grade(rollouts, self._grader)
        except UserError as error:
            self.failure = self.failure or str(error)

    def __enter__(self) -> _Share:
        return self

    def __exit__(self, *exception: object) -> None:
        self._grader.close()


def _gather(share: _Share, groups: ParallelGroups) -> tuple[list[dict[str, Any]], int]:
    """Return all replicas' graded samples in their order, and the comparisons that exceeded a limit; on every rank."""
    mine: list[Any] = [(share.samples, share.exceeded, share.failure)]
    for group in (groups.mp, groups.cp):
        if group.size() > 1:
            dist.broadcast_object_list(mine, src=dist.get_global_rank(group, 0), group=group)
    parts: list[Any] = mine
    if groups.dp_size > 1:
        parts = [None] * groups.dp_size
        dist.all_gather_object(parts, mine[0], group=groups.dp)
    failure = next((failure for _, _, failure in parts if failure), None)
    if failure:
        raise UserError(failure)
    samples = sorted((sample for part, _, _ in parts for sample in part), key=lambda sample: sample["sample_id"])
    return samples, sum(exceeded for _, exceeded, _ in parts)


def _grade(rollouts: Rollouts, grader: Grader) -> list[dict[str, Any]]:
    graded = []
    for i, prompt in enumerate(rollouts.prompts):
        assert prompt.answer is not None  # load_problems asks for one
        found, correct = grader.grade(rollouts.texts[i], prompt.answer)
        graded.append(
            {
                "sample_id": rollouts.sample_ids[i],
                "id": prompt.id,
                **({} if prompt.domain is None else {"domain": prompt.domain}),
                "response": rollouts.texts[i],
                "found": found,
                "answer": prompt.answer,
                "correct": correct,
                "finish_reason": rollouts.finish_reasons[i],
                "length": rollouts.lengths[i] - rollouts.prompt_lengths[i] - rollouts.prefix_lengths[i],
            }
        )
    return graded


def summarise(samples: list[dict[str, Any]], samples_per_problem: int = 1, exceeded: int = 0) -> dict[str, Any]:
    """Return the totals over graded samples, and the samples themselves.

    Returns:
        accuracy, accuracy_low, accuracy_high, problems and pass_at_k (accuracy.measure); correct, total,
        mean_response_length, finish_reasons (counts), grader_exceeded (comparisons that ran past a limit and count as
        wrong), domains (the same numbers per domain, where problems have one) and samples (one dict per response).
    """
    domains = sorted({sample["domain"] for sample in samples if "domain" in sample})
    return {
        **_totals(samples, samples_per_problem),
        "grader_exceeded": exceeded,
        **(
            {"domains": {name: _totals(_of(samples, name), samples_per_problem) for name in domains}} if domains else {}
        ),
        "samples": samples,
    }


def _of(samples: list[dict[str, Any]], domain: str) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample.get("domain") == domain]


def _totals(samples: list[dict[str, Any]], samples_per_problem: int) -> dict[str, Any]:
    correct: Counter[int] = Counter()
    for sample in samples:
        correct[sample["sample_id"] // samples_per_problem] += sample["correct"]
    return {
        **measure(list(correct.values()), samples_per_problem),
        "correct": sum(correct.values()),
        "total": len(samples),
        "mean_response_length": sum(sample["length"] for sample in samples) / max(1, len(samples)),
        "finish_reasons": dict(Counter(sample["finish_reason"] for sample in samples)),
    }


def training_record(result: dict[str, Any]) -> dict[str, float]:
    """Return what a training run records of an evaluation: flat numbers, none of them missing.

    Its keys are accuracy, accuracy_low, accuracy_high, pass_at_K and accuracy/DOMAIN as far as there are such, and
    evaluation_response_length. Where responses were drawn from NaN or infinity there is no accuracy to record, but
    evaluation_not_finite: the number of problems with such a response.
    """
    if result.get("problems_not_finite"):
        return {"evaluation_not_finite": float(result["problems_not_finite"])}
    record = {key: result[key] for key in ("accuracy", "accuracy_low", "accuracy_high") if result[key] is not None}
    record |= {f"pass_at_{k}": value for k, value in result["pass_at_k"].items() if k != "1"}
    record |= {f"accuracy/{name}": domain["accuracy"] for name, domain in result.get("domains", {}).items()}
    return record | {"evaluation_response_length": result["mean_response_length"]}


def describe(result: dict[str, Any]) -> str:
    """Return an evaluation as text: accuracy with its interval, pass@k, a row per domain, how responses ended."""
    lines = [f"accuracy {result['accuracy']:.4f} ({result['correct']} of {result['total']} responses right)"]
    if result["accuracy_low"] is not None:
        lines[0] += f", 95 % interval {_between(result)} over {result['problems']} problems"
    lines += [f"pass@{k} {value:.4f}" for k, value in result["pass_at_k"].items() if k != "1"]
    domains = result.get("domains", {})
    width = max((len(name) for name in domains), default=0)
    for name, row in domains.items():
        passed = "".join(f"  pass@{k} {value:.4f}" for k, value in row["pass_at_k"].items() if k != "1")
        lines.append(
            f"  {name:<{width}}  {row['accuracy']:.4f}  {_between(row):>13}  {row['problems']} problems{passed}"
        )
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(result["finish_reasons"].items()))
    lines.append(f"mean response length {result['mean_response_length']:.1f} tokens; finished by: {reasons}")
    if result["grader_exceeded"]:
        lines.append(
            f"{result['grader_exceeded']} comparisons exceeded evaluation.grader_timeout or the grader's memory and "
            "count as wrong"
        )
    return "\n".join(lines)


def _between(row: dict[str, Any]) -> str:
    return "" if row["accuracy_low"] is None else f"{row['accuracy_low']:.4f}-{row['accuracy_high']:.4f}"
