"""The pictures of a report: which recorded numbers are drawn together, and how.

A plot whose numbers were not recorded is left out. One run: a colour a series; several: a colour a run.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megatron_tropd.json_files import refuse_foreign, write_bytes

# Okabe and Ito's palette, which the colour-blind can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Plot:
    """One picture: the records' keys that it shows, with their legends."""

    name: str
    title: str
    unit: str
    series: dict[str, str]
    source: str = "metrics"  # or "evaluations"
    log: bool = False
    stacked: bool = False


PLOTS = (
    Plot("accuracy", "Accuracy on the evaluation problems", "share right", {"accuracy": "accuracy"}, "evaluations"),
    Plot(
        "divergence",
        "Divergence from the teacher on held-out prompts",
        "nats a token",
        {"held_out_kl": "held-out KL"},
        "evaluations",
    ),
    Plot(
        "loss",
        "Loss by kind of token",
        "nats a token",
        {"loss": "whole", "loss_trust": "trusted", "loss_outlier": "outliers", "loss_guidance": "guidance"},
    ),
    Plot(
        "trust",
        "Trust region: share of trusted tokens, mean acceptance ratio",
        "share of student tokens",
        {"trust_fraction": "trusted (mean M)", "mean_rho": "mean ρ"},
    ),
    Plot("outlier", "Forward KL on outlier tokens", "nats a token", {"outlier_fkl": "forward KL"}),
    Plot(
        "advantage",
        "Advantage: the teacher's log-probability minus the student's",
        "nats",
        {"advantage_mean": "mean", "advantage_min": "lowest", "advantage_max": "highest"},
    ),
    Plot(
        "entropy",
        "Entropy on student tokens",
        "nats",
        {"student_entropy": "student", "teacher_entropy": "teacher"},
    ),
    Plot(
        "length",
        "Length of the student's part and of the teacher's prefix",
        "tokens",
        {"response_length": "student's tokens", "prefix_length": "prefix"},
    ),
    Plot(
        "finish",
        "Why responses end",
        "share of responses",
        {"finish_eos": "EOS", "finish_stop": "stop string", "finish_length": "too long", "finish_prefix": "all prefix"},
    ),
    Plot(
        "mismatch",
        "Rollout against trainer: difference of log-probabilities",
        "nats",
        {"logprob_mismatch": "mean |difference|", "logprob_mismatch_max": "largest"},
        log=True,
    ),
    Plot("gradient", "Gradient norm before clipping", "norm", {"grad_norm": "norm"}, log=True),
    Plot("rate", "Learning rate", "", {"learning_rate": "learning rate"}),
    Plot(
        "seconds",
        "Seconds a step, by stage",
        "seconds",
        {"seconds_rollout": "rollout", "seconds_teacher": "teacher", "seconds_update": "update"},
        stacked=True,
    ),
    Plot("throughput", "Throughput", "tokens a second", {"tokens_per_second": "tokens a second"}),
)


@dataclass
class RunRecords:
    """What one run's folder holds."""

    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any]
    recipe: str

    def column(self, source: str, key: str) -> tuple[list[int], list[float]]:
        """Return steps and values of the records that hold a number under `key`."""
        records = [r for r in getattr(self, source) if r.get(key) is not None]
        return [r["step"] for r in records], [float(r[key]) for r in records]


def draw(runs: list[RunRecords]) -> list[tuple[str, str, Figure]]:
    """Return (file name, title, figure) of every plot that these runs have numbers for."""
    drawn = []
    for plot in PLOTS:
        keys = [k for k in plot.series if any(any(run.column(plot.source, k)[1]) for run in runs)]
        if not keys:
            continue
        figure, axes = _new_figure(plot.title)
        if plot.stacked:
            _draw_stacked(axes, plot, keys, runs)
        else:
            _draw_lines(axes, plot, keys, runs)
        axes.set_ylabel(plot.unit)
        if plot.log and all(min(run.column(plot.source, k)[1], default=1) > 0 for run in runs for k in keys):
            axes.set_yscale("log")
        if labels := axes.get_legend_handles_labels()[1]:
            where = {"loc": "upper center", "ncols": len(labels)} if plot.stacked else {"loc": "best"}
            axes.legend(frameon=False, fontsize=9, **where)
        drawn.append((plot.name, plot.title, figure))
    return drawn + _draw_histograms(runs)


def _new_figure(title: str, size: tuple[float, float] = (6.4, 3.8)) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _draw_lines(axes: Any, plot: Plot, keys: list[str], runs: list[RunRecords]) -> None:
    """One run: a colour a series. Several: a colour a run and a line style a series."""
    for i, run in enumerate(runs):
        for j, key in enumerate(keys):
            steps, values = run.column(plot.source, key)
            if not values:
                continue
            colour = _COLOURS[(i if len(runs) > 1 else j) % len(_COLOURS)]
            style = _STYLES[j % len(_STYLES)] if len(runs) > 1 else "-"
            label = run.name if len(keys) == 1 else f"{run.name}: {plot.series[key]}"
            label = plot.series[key] if len(runs) == 1 and len(keys) > 1 else label if len(runs) > 1 else None
            marker = "o" if plot.source == "evaluations" or len(values) == 1 else None
            smooth = _running_mean(values)
            if smooth is not values:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, style, color=colour, linewidth=1.6, marker=marker, markersize=4, label=label)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_stacked(axes: Any, plot: Plot, keys: list[str], runs: list[RunRecords]) -> None:
    """One run: areas over the steps. Several: one bar of means a run."""
    columns = [[run.column(plot.source, key)[1] for key in keys] for run in runs]
    labels = [plot.series[key] for key in keys]
    if len(runs) == 1 and len({len(column) for column in columns[0]}) == 1:
        steps = runs[0].column(plot.source, keys[0])[0]
        axes.stackplot(steps, *columns[0], labels=labels, colors=_COLOURS, alpha=0.85)
        axes.set(xlabel="step", xlim=(steps[0], max(steps[-1], steps[0] + 1)))
        axes.set_ylim(0, 1.2 * max(map(sum, zip(*columns[0], strict=True))))  # room for the legend
        return
    means = [[sum(column) / max(1, len(column)) for column in run] for run in columns]
    bottom = [0.0] * len(runs)
    for j, label in enumerate(labels):
        heights = [mean[j] for mean in means]
        axes.bar([run.name for run in runs], heights, 0.5, bottom=bottom, label=label, color=_COLOURS[j])
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 1.2 * max(bottom))
    axes.grid(axis="x", visible=False)


def _draw_histograms(runs: list[RunRecords]) -> list[tuple[str, str, Figure]]:
    """ρ's histogram over the steps, one map a run, where records hold `rho_histogram` (counts over [0, 1])."""
    drawn = []
    for i, run in enumerate(runs):
        records = [r for r in run.metrics if r.get("rho_histogram")]
        if len(records) < 2:
            continue
        shares = [[n / max(1, sum(r["rho_histogram"])) for n in r["rho_histogram"]] for r in records]
        title = "Distribution of ρ over the steps" + (f": {run.name}" if len(runs) > 1 else "")
        figure, axes = _new_figure(title)
        extent = (records[0]["step"], records[-1]["step"], 0, 1)
        image = axes.imshow(
            list(zip(*shares, strict=True)), origin="lower", aspect="auto", extent=extent, cmap="viridis", norm="log"
        )
        figure.colorbar(image, label="share of tokens")
        axes.grid(visible=False)
        axes.set_xlabel("step")
        axes.set_ylabel("ρ")
        drawn.append((f"rho_{i}" if len(runs) > 1 else "rho", title, figure))
    return drawn


def _running_mean(values: list[float]) -> list[float]:
    """Mean over a centred window of a tenth of the points; the values themselves where they are few."""
    half = len(values) // 20
    if len(values) < 40:
        return values
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_accuracy(summary: dict[str, Any], path: str | Path) -> None:
    """Draw teacher, student before and student after as bars, and the trust fraction over the steps where it is given.

    `summary` holds {"teacher" | "student_before" | "student_after": {"accuracy"}} and perhaps "trust_fraction": [...].
    """
    labels = {"student_before": "student\nbefore", "student_after": "student\nafter", "teacher": "teacher"}
    bars = {label: summary[key]["accuracy"] for key, label in labels.items() if key in summary}
    trust = summary.get("trust_fraction") or []
    figure = Figure(figsize=(9.0 if trust else 4.6, 3.8), layout="constrained")
    left, *right = figure.subplots(1, 2 if trust else 1, squeeze=False)[0]
    drawn = left.bar(list(bars), [100 * value for value in bars.values()], 0.6, color=("#56B4E9", "#0072B2", "#999999"))
    left.bar_label(drawn, fmt="%.1f %%", padding=2)
    left.set(ylim=(0, 110), ylabel="% right")
    left.set_title("Accuracy on unseen problems", fontsize=11, loc="left")
    for axes in right:
        axes.plot(range(len(trust)), trust, color="#0072B2", alpha=0.3 if len(trust) >= 40 else 1.0, linewidth=1.0)
        axes.plot(range(len(trust)), _running_mean(trust), color="#0072B2", linewidth=1.8)
        axes.set(xlabel="step", ylabel="share of student tokens")
        axes.set_title("Inside the trust region", fontsize=11, loc="left")
        axes.grid(alpha=0.25, linewidth=0.6)
    for axes in (left, *right):
        axes.spines[["top", "right"]].set_visible(False)
    refuse_foreign(path, lambda p: b"Matplotlib" in p.read_bytes()[:1024], "a plot", "the picture")
    data = io.BytesIO()
    figure.savefig(data, dpi=120, format="png")
    write_bytes(path, data.getvalue())
