"""The catalogue of the report's plots: which recorded numbers are drawn together, with names and units.

Pure data, drawn by report_plots.js. A test compares every key with those that a real run records, so a renamed metric
cannot remove a plot; `only` marks keys that only some recipes or machines record.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Series:
    """One line: the key of its numbers, its name, and the keys of its interval."""

    key: str
    label: str
    low: str | None = None
    high: str | None = None
    only: str = ""  # where it is recorded, if not by every run of the default objective


@dataclass(frozen=True)
class Plot:
    """One picture. `kind`: lines, stacked (shares or parts of a whole), fan (quantiles) or heatmap (histograms)."""

    name: str
    section: str
    title: str
    unit: str
    series: tuple[Series, ...]
    note: str = ""  # what the reader must know to read it
    source: str = "metrics"  # or "evaluations"
    kind: str = "lines"
    log: bool = False
    percent: bool = False
    wide: bool = False  # over two columns
    smooth: bool = True  # whether a running mean says more than the line itself

    @property
    def keys(self) -> set[str]:
        """Every key that it reads."""
        named = (key for s in self.series for key in (s.key, s.low, s.high))
        return {key for key in named if key}


def _finish(reason: str, label: str) -> Series:
    return Series(f"finish_{reason}", label)


PLOTS = (
    Plot(
        "accuracy",
        "Results",
        "Accuracy on the evaluation problems",
        "problems answered correctly",
        (
            Series(
                "accuracy", "accuracy", "accuracy_low", "accuracy_high", only="with evaluation.problems in the recipe"
            ),
        ),
        source="evaluations",
        percent=True,
    ),
    Plot(
        "held_out",
        "Results",
        "Divergence from the teacher on held-out prompts",
        "nats per token",
        (
            Series(
                "held_out_kl",
                "forward KL",
                "held_out_kl_low",
                "held_out_kl_high",
                only="with evaluation.held_out in the recipe",
            ),
        ),
        "Exact over the vocabulary, on the teacher's own responses.",
        source="evaluations",
    ),
    Plot(
        "divergence",
        "Results",
        "Divergence from the teacher on the student's own tokens",
        "nats per token",
        (
            Series("reverse_kl", "reverse KL, sampled tokens"),
            Series("outlier_forward_kl", "forward KL, outliers", only="where the objective's outlier part is fkl"),
        ),
    ),
    Plot(
        "loss",
        "Learning",
        "Loss by kind of token",
        "nats per token",
        (
            Series("loss_trust", "trusted"),
            Series("loss_outlier", "outliers"),
            Series("loss_guidance", "guidance", only="while responses begin with a teacher's prefix"),
            Series("loss", "all tokens"),
        ),
        "The loss of trusted tokens estimates a gradient: its value may be negative and need not fall.",
    ),
    Plot("grad_norm", "Learning", "Gradient norm before clipping", "norm", (Series("grad_norm", "norm"),)),
    Plot("learning_rate", "Learning", "Learning rate", "", (Series("learning_rate", "learning rate"),), smooth=False),
    Plot(
        "trust",
        "Trust region",
        "Trusted tokens",
        "share",
        (
            Series("trust_fraction", "trusted tokens"),
            Series("mean_rho", "mean ρ"),
            Series("prefix_fraction", "teacher's prefix"),
            Series("ruled_out_fraction", "impossible to one of the models"),
        ),
        "ρ = min(π_teacher / π_student, 1) of a sampled token is the probability with which the gate trusts it.",
        percent=True,
    ),
    Plot(
        "rho",
        "Trust region",
        "Distribution of ρ",
        "ρ",
        (Series("rho_histogram", "share of tokens"),),
        "Colour: share of a step's student tokens in a bin, on a logarithmic scale. The top bin contains ρ = 1.",
        kind="heatmap",
        wide=True,
    ),
    Plot(
        "gradient_share",
        "Trust region",
        "Share of the gradient by kind of token",
        "share",
        (
            Series("gradient_share_trusted", "trusted"),
            Series("gradient_share_outlier", "outliers"),
            Series("gradient_share_guidance", "guidance"),
        ),
        "Sum over tokens of the absolute derivatives of the loss in all of the student's logits.",
        kind="stacked",
        percent=True,
    ),
    Plot(
        "advantage",
        "Trust region",
        "Advantage",
        "nats",
        (
            Series("advantage_p50", "median"),
            Series("advantage", "mean"),
            Series("advantage_p10", "10 to 90%", low="advantage_p10", high="advantage_p90"),
            Series("advantage_p01", "1 to 99%", low="advantage_p01", high="advantage_p99"),
            Series("advantage_min", "lowest"),
            Series("advantage_max", "highest"),
        ),
        "The teacher's log-probability of a sampled token minus the student's.",
        kind="fan",
    ),
    Plot(
        "entropy",
        "Trust region",
        "Entropy of the next token",
        "nats",
        (Series("student_entropy", "student"), Series("teacher_entropy", "teacher")),
        "Over the student's own tokens.",
    ),
    Plot(
        "length",
        "Rollouts",
        "Length of responses",
        "tokens",
        (Series("response_length", "written by the student"), Series("prefix_length", "teacher's prefix")),
        "Means per response.",
    ),
    Plot(
        "finish",
        "Rollouts",
        "How responses end",
        "share of responses",
        (
            _finish("eos", "end of text"),
            _finish("stop", "stop string"),
            _finish("length", "length limit"),
            _finish("prefix", "whole response given by the teacher"),
        ),
        kind="stacked",
        percent=True,
    ),
    Plot(
        "filtered",
        "Rollouts",
        "Responses that a filter met",
        "share of responses",
        (
            Series("filtered_fraction", "any"),
            Series("filtered_truncated", "truncated", only="with rollout.on_truncated"),
            Series("filtered_repeating", "repeating", only="with rollout.on_repeating"),
            Series("filtered_empty", "empty", only="with rollout.on_empty"),
            Series("filtered_duplicate", "duplicate", only="with rollout.on_duplicate"),
        ),
        "What becomes of them: rollout.on_truncated, on_repeating, on_empty and on_duplicate in the recipe.",
        percent=True,
    ),
    Plot(
        "mismatch",
        "Rollouts",
        "Mismatch of rollout and trainer",
        "nats",
        (
            Series("logprob_mismatch", "mean"),
            Series("logprob_mismatch_p50", "median"),
            Series("logprob_mismatch_p90", "90% below"),
            Series("logprob_mismatch_p99", "99% below"),
            Series("logprob_mismatch_max", "largest"),
        ),
        "Absolute difference of the log-probabilities that inference engine and trainer give the same token.",
        log=True,
    ),
    Plot(
        "seconds",
        "Speed",
        "Seconds per step by stage",
        "seconds",
        (
            Series("seconds_rollout", "rollout"),
            Series("seconds_teacher", "teacher"),
            Series("seconds_update", "update"),
        ),
        kind="stacked",
    ),
    Plot(
        "memory",
        "Speed",
        "Memory by stage",
        "GB",
        (
            Series("memory_rollout_gb", "rollout"),
            Series("memory_teacher_gb", "teacher"),
            Series("memory_update_gb", "update"),
        ),
        "Of the fullest rank: on GPUs the peak of allocated tensors, on CPUs the process's resident memory.",
        smooth=False,
    ),
    Plot(
        "throughput",
        "Speed",
        "Throughput",
        "tokens per second",
        (Series("tokens_per_second", "prompts and responses"),),
    ),
)


def catalogue() -> list[dict[str, Any]]:
    """Return PLOTS as report_plots.js reads them."""
    return [asdict(plot) for plot in PLOTS]


def keys_of(source: str) -> set[str]:
    """Return every key that the plots read from `metrics` or `evaluations`."""
    return {key for plot in PLOTS if plot.source == source for key in plot.keys}
