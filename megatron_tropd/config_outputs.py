"""The recipe's keys of what a run leaves and measures: `checkpoint.*`, `evaluation.*` and `logging.*`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.config_key import FILES
from megatron_tropd.config_key import key as _key


@dataclass
class CheckpointConfig:
    """`checkpoint.*`."""

    dir: str | None = _key(None, "checkpoint folder; default: logging.dir/checkpoints")
    save_interval: int = _key(50, "steps between checkpoints; 0: only at the end and on SIGTERM", low=0)
    keep: int = _key(2, "number of newest checkpoints to keep; 0: all", low=0)
    resume: bool = _key(True, "continue from the newest complete checkpoint in `dir`, if there is one")


@dataclass
class EvaluationConfig:
    """`evaluation.*`."""

    problems: Any = _key(None, "files of problems with answers", takes=FILES)
    held_out: Any = _key(None, "files of prompts: forward KL to the teacher before and after training", takes=FILES)
    held_out_responses: Any = _key(None, "files of teacher responses to held_out; default: its own", takes=FILES)
    interval: int = _key(0, "steps between evaluations; 0: none during training", low=0)
    samples: int = _key(1, "samples per problem; the accuracy is their mean", low=1)
    temperature: float = _key(0.0, "sampling temperature; 0 is greedy", low=0)
    top_k: int | None = _key(None, "sample from the k most probable; default: rollout.top_k", low=0)
    top_p: float | None = _key(None, "nucleus sampling with this mass; default: rollout.top_p", above=0, high=1)
    stop: list[str] | None = _key(None, "strings that end a response; default: rollout.stop")
    max_new_tokens: int | None = _key(None, "longest response; default: rollout.max_new_tokens", low=1)
    answer_pattern: str = _key(
        "auto",
        "regex; group 1 of its last match is the answer; auto: boxed, else after ####, after 'answer is', last number",
    )
    grader: str = _key(
        "auto",
        "how answers are compared; math: as numbers, forms and algebra; multiple_choice: by the option's letter; "
        "exact: as text, ignoring case, spaces and a final full stop; auto: math",
        ("auto", "math", "multiple_choice", "exact"),
    )
    grader_timeout: float = _key(5.0, "CPU seconds after which a comparison counts as wrong", above=0)


@dataclass
class WandbConfig:
    """`logging.wandb.*`: Weights & Biases, an extra."""

    project: str | None = _key(None, "project of Weights & Biases; null: it is not used")
    entity: str | None = _key(None, "user or team; default: that of the login")
    name: str | None = _key(None, "name of the run; default: the last part of logging.dir")
    mode: str = _key("online", "offline: keep the run in logging.dir/wandb, for `wandb sync`", ("online", "offline"))


@dataclass
class MlflowConfig:
    """`logging.mlflow.*`: MLflow, an extra."""

    tracking_uri: str | None = _key(None, "folder (file:runs/mlflow) or server of MLflow; null: it is not used")
    experiment: str = _key("megatron_tropd", "experiment, which is made if it does not exist")
    name: str | None = _key(None, "name of the run; default: the last part of logging.dir")


@dataclass
class LoggingConfig:
    """`logging.*`."""

    dir: str = _key("runs/default", "the run's folder: recipe.yaml, metrics.jsonl, summary.json, checkpoints/")
    progress: str = _key(
        "auto",
        "what is shown of progress; panel: live; lines: a line per interval; auto: a panel on a terminal, else lines",
        ("auto", "panel", "lines", "none"),
    )
    progress_interval: float = _key(10.0, "seconds between the lines of progress in a log", low=0)
    tensorboard: bool = _key(True, "write TensorBoard events to dir/tensorboard")
    wandb: WandbConfig = field(default_factory=WandbConfig, metadata={"help": "Weights & Biases"})
    mlflow: MlflowConfig = field(default_factory=MlflowConfig, metadata={"help": "MLflow"})
    samples: int = _key(2, "rollouts per step in samples.jsonl, with the gate of each token; 0: none", low=0)
    answers: int = _key(32, "problems per evaluation whose graded responses go to answers.jsonl; 0: none", low=0)
