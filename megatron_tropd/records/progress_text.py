"""The numbers of a step and of an evaluation as short texts, the same ones in the panel and in a log's lines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_tropd.system.short_text import duration

if TYPE_CHECKING:
    from rich.text import Text

_NUMBERS = {
    "loss": ("loss", "{:.4g}"),
    "trust_fraction": ("trust", "{:.1%}"),
    "mean_rho": ("rho", "{:.3f}"),
    "response_length": ("length", "{:.1f}"),
    "grad_norm": ("gradient", "{:.3g}"),
    "tokens_per_second": ("tokens/s", "{:,.0f}"),
}
BY_STAGE = ("seconds", "GB")  # the figures that have a value per stage
_STAGES = ("rollout", "teacher", "update")
_SAMPLE_LINES = 4
_STYLES = {"trust": "", "outlier": "bold red", "guidance": "blue", "dropped": "dim"}


def figures(record: dict[str, Any], evaluations: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (name, text) of a step's numbers and of the evaluations so far; those that are missing are left out."""
    shown = [(name, form.format(record[key])) for key, (name, form) in _NUMBERS.items() if _is_number(record.get(key))]
    for key, name, form in (("accuracy", "accuracy", "{:.1%}"), ("held_out_kl", "held-out KL", "{:.4g}")):
        found = [evaluation[key] for evaluation in evaluations if _is_number(evaluation.get(key))]
        if found:
            first = f"{form.format(found[0])} → " if len(found) > 1 else ""
            shown.append((name, first + form.format(found[-1])))
    if seconds := _by_stage(record, "seconds_{}", "{:.3g}"):
        shown.append((BY_STAGE[0], seconds))
    if memory := _by_stage(record, "memory_{}_gb", "{:.2f}"):
        shown.append((BY_STAGE[1], memory))
    return shown


def _by_stage(record: dict[str, Any], key: str, form: str) -> str:
    values = [(stage, record.get(key.format(stage))) for stage in _STAGES]
    return " ".join(f"{stage} {form.format(value)}" for stage, value in values if _is_number(value))


def line_of(step: int, total: int, record: dict[str, Any], accuracy: float | None, seconds_left: float) -> str:
    """Return a step as one line of a log: the panel's numbers, and the time left."""
    evaluations = [] if accuracy is None else [{"accuracy": accuracy}]
    texts = [f"{name} {text}" for name, text in figures(record, evaluations)]
    if step + 1 < total:
        texts.append(f"{duration(seconds_left)} left")
    return f"step {step + 1}/{total}: {', '.join(texts)}"


def evaluation_text(record: dict[str, Any]) -> str:
    """Return an evaluation as one line, each measure with its 95% interval."""
    texts = []
    for key, value in record.items():
        if not isinstance(value, float) or key.endswith(("_low", "_high")):
            continue
        form = "{:.1%}" if key.startswith(("accuracy", "pass_at")) else "{:.4g}"
        low, high = record.get(f"{key}_low"), record.get(f"{key}_high")
        interval = "" if low is None or high is None else f" ({form.format(low)} to {form.format(high)})"
        name = key.removeprefix("evaluation_").replace("_", " ")
        texts.append(f"{name} {form.format(value)}{interval}")
    return f"evaluation after {record['step']} steps: {', '.join(texts)}"


def sample_text(sample: dict[str, Any], width: int) -> Text:
    """Return a record of samples.jsonl in colours, cut after a few lines: outliers red, prefix blue, dropped dim."""
    from rich.text import Text

    text = Text().append(_last_line(sample["prompt"]) + "\n", style="dim")
    room = _SAMPLE_LINES * max(width - 4, 20)
    for token in sample["tokens"]:
        piece = token["text"].replace("\n", "⏎")
        room -= len(piece)
        if room < 0:
            text.append(" …", style="dim")
            break
        text.append(piece, style=_STYLES[token["kind"]])
    return text


def _last_line(prompt: str) -> str:
    """Return the end of a prompt, where the question stands, in one line."""
    return " ".join(prompt.split())[-160:]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
