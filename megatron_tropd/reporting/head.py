"""The head of a report: the result in one sentence with its interval, and the facts of each run.

Everything comes from the run's records (reporting/run_records.py); missing values are omitted.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from megatron_tropd.methods import METHODS
from megatron_tropd.reporting.run_records import RunRecords
from megatron_tropd.system.short_text import count, duration

_OUTLIERS = {
    "fkl": "forward KL to the teacher's top {topk} on outliers",
    "fkl_advantage": "forward KL to the teacher's top {topk} as advantage on outliers",
    "mask": "no loss on outliers",
    "clip": "advantage clipped at {clip} on outliers",
}
_NAMED = 8  # skipped steps that are named


def sentence(run: RunRecords) -> str:
    """Return the run's result, with its 95% interval where one was recorded."""
    if run.steps == 0:
        return "No step is recorded yet."
    parts = [text for text in (_accuracy(run), _held_out(run)) if text]
    if not parts:
        ends = run.ends("metrics", "loss")
        loss = f" The loss went from {ends[0]:.4g} to {ends[1]:.4g}." if ends else ""
        return f"{_after(run.steps)}: nothing was evaluated (evaluation.problems, evaluation.held_out).{loss}"
    return f"{_after(run.steps)}, {'; '.join(parts)}."


def _after(steps: int) -> str:
    return f"After {steps:,} step{'' if steps == 1 else 's'}"


def _evaluated(run: RunRecords, key: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    records = [record for record in run.evaluations if isinstance(record.get(key), int | float)]
    return (records[0], records[-1]) if records else None


def _accuracy(run: RunRecords) -> str:
    if not (found := _evaluated(run, "accuracy")):
        return ""
    first, last = found
    text = f"the student answers {last['accuracy']:.1%} of the problems correctly{_interval(last, 'accuracy', '.1%')}"
    if first is last:
        return text.replace("the student answers", f"(evaluated after {last['step']:,}) the student answers")
    return f"{text}, {first['accuracy']:.1%} before{_at(first)}{_lag(run, last)}"


def _held_out(run: RunRecords) -> str:
    if not (found := _evaluated(run, "held_out_kl")):
        return ""
    first, last = found
    interval = _interval(last, "held_out_kl", ".3g")
    text = f"the divergence from the teacher on held-out prompts is {last['held_out_kl']:.3g} nats per token{interval}"
    return text if first is last else f"{text}, {first['held_out_kl']:.3g} before{_at(first)}{_lag(run, last)}"


def _at(record: dict[str, Any]) -> str:
    return "" if record["step"] == 0 else f" (after {record['step']:,} steps)"


def _lag(run: RunRecords, record: dict[str, Any]) -> str:
    """Say where the last evaluation is older than the last step."""
    return "" if record["step"] >= run.steps else f" (last evaluated after {record['step']:,} steps)"


def _interval(record: dict[str, Any], key: str, form: str) -> str:
    low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
    if low is None or high is None:
        return ""
    return f" (95% interval {low:{form}} to {high:{form}})"


def facts(run: RunRecords) -> list[tuple[str, str]]:
    """Return (name, value) of what the run was: models, method, layout, hardware, versions, time and state."""
    start = run.starts[-1] if run.starts else {}
    models = start.get("models") or {}
    return [
        (name, value)
        for name, value in (
            ("State", _state(run)),
            ("Student", _model(models.get("student"), run.recipe.get("student.hf_path"))),
            ("Teacher", _model(models.get("teacher"), run.recipe.get("teacher.hf_path"))),
            ("Method", method(run.recipe)),
            ("Layout", layout(run)),
            ("Hardware", _hardware(start)),
            ("Commit", _commit(start)),
            ("Started", _started(run)),
            ("Also measured", _further(run)),
            ("Skipped", _skipped(run)),
            ("Time", _time(run)),
            ("Tokens", _tokens(run)),
            ("Versions", _versions(start)),
            ("Folder", str(run.folder)),
            ("Command", _command(start)),
        )
        if value
    ]


def _state(run: RunRecords) -> str:
    planned = f" of {run.planned_steps:,}" if isinstance(run.planned_steps, int) else ""
    if run.finished:
        return f"finished: {run.steps:,}{planned} steps"
    why = "stopped before its end" if run.summary else "still running, or ended without saving"
    return f"not finished: {run.steps:,}{planned} steps; {why}"


def _model(model: dict[str, Any] | None, path: str | None) -> str:
    if not model:
        return str(path or "")
    return f"{model.get('path')} ({model.get('type')}, {count(model.get('parameters') or 0)} parameters)"


def method(recipe: dict[str, Any]) -> str:
    """Return what the recipe's objective does, in words."""
    name = recipe.get("objective.name")
    if name is None:
        return ""
    if name in METHODS and not METHODS[name].gated:
        return f"{name}: {METHODS[name].what}"
    fixed = name.split("_")[-1] if name.endswith(("_mask", "_clip")) else None
    fixed = {"mask_outlier": "mask", "clip_outlier": "clip", "fkl_outlier": "fkl"}.get(name, fixed)
    outlier = fixed or recipe.get("objective.outlier") or "fkl"
    topk = recipe.get("objective.topk") or METHODS[name].topk if name in METHODS else None
    values = {"topk": topk, "clip": recipe.get("objective.clip")}
    gate = recipe.get("objective.gate") or "bernoulli"
    parts = [f"{gate} gate", _OUTLIERS.get(outlier, outlier).format(**values)]
    schedule = recipe.get("guidance.schedule")
    if name.startswith("tropd") and schedule not in (None, "none"):
        parts.append(f"{schedule} guidance from {recipe.get('guidance.start')}")
    return f"{name}: {', '.join(parts)}"


def layout(run: RunRecords) -> str:
    """Return the parallel sizes above 1 of both models."""
    sizes = {"tensor": "TP", "pipeline": "PP", "context": "CP", "expert": "EP"}
    texts = []
    for role in ("student", "teacher"):
        found = {}
        for kind, short in sizes.items():
            key = f"{role}.{kind}_model_parallel_size" if kind != "context" else f"{role}.context_parallel_size"
            found[short] = run.recipe.get(key) or 1
        parts = [f"{short} {size}" for short, size in found.items() if size != 1]
        if role == "student" and run.summary.get("data_parallel_size"):
            parts.append(f"DP {run.summary['data_parallel_size']}")
        if role == "teacher" and run.recipe.get("teacher.ranks") == "dedicated":
            parts.append("dedicated ranks")
        texts.append(f"{role} {' '.join(parts) or 'unsharded'}")
    return ", ".join(texts) if run.recipe else ""


def _hardware(start: dict[str, Any]) -> str:
    if not start.get("device"):
        return ""
    processes, nodes = start.get("processes", 1), start.get("nodes", 1)
    return f"{start['device']}; {_several(processes, 'process', 'es')} on {_several(nodes, 'node', 's')}"


def _several(number: int, noun: str, ending: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def _versions(start: dict[str, Any]) -> str:
    versions = start.get("versions")
    if not isinstance(versions, dict):
        return ""
    return ", ".join(f"{name} {version}" for name, version in {"Python": start.get("python"), **versions}.items())


def _commit(start: dict[str, Any]) -> str:
    commit = str(start.get("commit") or "")
    return f"{commit[:12]} with changes" if commit.endswith("+") else commit[:12]


def _command(start: dict[str, Any]) -> str:
    command = start.get("command")
    if not isinstance(command, list) or not command:
        return ""
    program = Path(str(command[0])).name
    return shlex.join(["megatron-tropd" if program == "__main__.py" else program, *map(str, command[1:])])


def _started(run: RunRecords) -> str:
    if not run.starts:
        return ""
    again = len(run.starts) - 1
    resumed = "" if not again else f"; resumed {again} time{'' if again == 1 else 's'}, last at {_when(run.starts[-1])}"
    return f"{_when(run.starts[0])}{resumed}"


def _when(start: dict[str, Any]) -> str:
    return str(start.get("started", "?")).replace("T", " ").replace("+00:00", " UTC")


def _time(run: RunRecords) -> str:
    seconds = _seconds(run)
    return f"{duration(seconds)} in steps, {seconds / run.steps:.3g} s per step" if seconds else ""


def _further(run: RunRecords) -> str:
    """Return pass@k and the accuracy by domain, before and after, as far as evaluations have them."""
    last = run.evaluations[-1] if run.evaluations else {}
    texts = []
    for key in (key for key in last if key.startswith(("pass_at_", "accuracy/"))):
        if found := _evaluated(run, key):
            name = key.removeprefix("accuracy/").replace("pass_at_", "pass@")
            before = "" if found[0] is found[1] else f"{found[0][key]:.1%} → "
            texts.append(f"{name} {before}{found[1][key]:.1%}")
    return ", ".join(texts)


def _skipped(run: RunRecords) -> str:
    """Return which steps made no update, and why."""
    skipped = run.summary.get("skipped_steps")
    if not isinstance(skipped, list) or not skipped:
        return ""
    named = [f"{entry.get('step')} ({entry.get('reason')})" for entry in skipped if isinstance(entry, dict)]
    more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
    return f"{_several(len(named), 'step', 's')} without an update: {', '.join(named[:_NAMED])}{more}"


def _seconds(run: RunRecords) -> float:
    """Return the seconds of all recorded steps, those of earlier starts among them."""
    keys = ("seconds_rollout", "seconds_teacher", "seconds_update")
    return sum(value for key in keys for value in run.column("metrics", key) if value is not None)


def _tokens(run: RunRecords) -> str:
    generated = sum(value for value in run.column("metrics", "generated_tokens") if value is not None)
    trained = sum(value for value in run.column("metrics", "num_loss_tokens") if value is not None)
    parts = [(generated, "generated by the student"), (trained, "with a loss")]
    return ", ".join(f"{count(number)} {what}" for number, what in parts if number)


def columns(run: RunRecords) -> list[tuple[str, str, str]]:
    """Return (heading, last value, what to know of it) of the run's figures, for its tiles or its row in a table."""
    rate = [value for value in run.column("metrics", "tokens_per_second") if value is not None]
    seconds = _seconds(run)
    time = duration(seconds) if seconds else ""
    planned = f"of {run.planned_steps:,}" if isinstance(run.planned_steps, int) else ""
    return [
        ("steps", f"{run.steps:,}", planned),
        ("accuracy", *_evaluated_change(run, "accuracy", ".1%")),
        ("held-out KL", *_evaluated_change(run, "held_out_kl", ".3g")),
        ("trusted tokens", *_change(run.ends("metrics", "trust_fraction"), ".1%")),
        ("loss", *_change(run.ends("metrics", "loss"), ".3g")),
        ("tokens per second", f"{sum(rate) / len(rate):,.0f}" if rate else "", "mean"),
        ("time in steps", time, f"{_seconds(run) / run.steps:.3g} s per step" if time else ""),
    ]


def _evaluated_change(run: RunRecords, key: str, form: str) -> tuple[str, str]:
    found = _evaluated(run, key)
    if not found:
        return "", ""
    first, last = found
    interval = _interval(last, key, form).strip(" ()").replace("95% interval ", "")
    value, detail = _change((first[key], last[key]) if first is not last else None, form)
    return value or f"{last[key]:{form}}", "; ".join(filter(None, (interval, detail)))


def _change(ends: tuple[float, float] | None, form: str) -> tuple[str, str]:
    return (f"{ends[1]:{form}}", f"{ends[0]:{form}} at first") if ends else ("", "")
