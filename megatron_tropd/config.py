"""The recipe's keys: one tree of typed dataclasses, each key with its default, its documentation and its range.

Every key is documented here, once; defaults are the paper's (arXiv 2606.01249, its experiments) wherever it names a
value. Reading, overriding and checking recipes is `recipe.py`.

    recipe = load_recipe("tropd_paper", ["training.steps=10", "student.tensor_model_parallel_size=2"])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _key(
    default: Any,
    help: str,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    words: tuple[str, ...] = (),
    takes: str | None = None,
) -> Any:
    """Declare a key: documentation, allowed values of an enumeration, range [low, high] or values > `above`.

    `words` are the texts that a numeric key takes beside its numbers; `takes` the types of a key declared as Any.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "words": words}
    metadata["takes"] = takes
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    """`student.*` and `teacher.*`."""

    hf_path: str | None = _key(None, "Hugging Face folder: config.json, tokenizer and (if no checkpoint) weights")
    checkpoint: str | None = _key(None, "Megatron distributed checkpoint of the weights; else hf_path's are converted")
    tensor_model_parallel_size: int = _key(1, "ranks that share each layer's matrices", low=1)
    pipeline_model_parallel_size: int = _key(1, "pipeline stages", low=1)
    virtual_pipeline_model_parallel_size: int | None = _key(None, "model chunks a stage (interleaved schedule)", low=2)
    num_layers_in_first_pipeline_stage: int | None = _key(None, "layers of the first stage, if not as others", low=1)
    num_layers_in_last_pipeline_stage: int | None = _key(None, "layers of the last stage, if not as others", low=1)
    account_for_embedding_in_pipeline_split: bool = _key(False, "count the embedding as a layer of the first stage")
    account_for_loss_in_pipeline_split: bool = _key(False, "count output layer and loss as a layer of the last stage")
    context_parallel_size: int = _key(1, "ranks that share each sequence", low=1)
    expert_model_parallel_size: int = _key(1, "ranks among which the experts are dealt out", low=1)
    expert_tensor_parallel_size: int | None = _key(
        None, "ranks that share each expert's matrices; default: tensor_model_parallel_size", low=1
    )
    sequence_parallel: bool = _key(False, "shard activations outside attention and MLP over the tensor-parallel ranks")
    dtype: str = _key("bfloat16", "parameters and activations", ("float32", "bfloat16", "float16"))
    fp8: str | None = _key(
        None,
        "matrix products of training and scoring in 8 bits: Transformer Engine's format (rollouts stay in dtype)",
        ("e4m3", "hybrid"),
    )
    fp8_recipe: str = _key(
        "tensorwise",
        "with fp8, one scale a tensor or a block of it; mxfp8 is Blackwell's",
        ("tensorwise", "blockwise", "mxfp8"),
    )
    recompute: str | None = _key(
        None,
        "activations recomputed in the backward pass; selective: those of MLPs and MoE experts (without Transformer "
        "Engine: of the attention, which otherwise stores its probabilities); full: those of whole layers",
        ("selective", "full"),
    )
    offload: bool = _key(False, "teacher only: keep its weights in host memory between its passes")
    ranks: str = _key(
        "shared",
        "teacher only: on the student's ranks, taking turns, or on ranks of its own, the job's last ones",
        ("shared", "dedicated"),
    )
    verify: str = _key(
        "auto",
        "before training from hf_path: compare a few layers, embedding and output layer with transformers (fp32)",
        ("auto", "off"),
    )
    replicas: int = _key(1, "teacher only, with ranks=dedicated: replicas among which batches are shared out", low=1)


@dataclass
class TokenizerConfig:
    """`tokenizer.*`."""

    path: str | None = _key(None, "Hugging Face folder or sentencepiece .model file; default: the student's hf_path")
    chat_template: str | None = _key(None, "file with a Jinja chat template that replaces the tokenizer's own")
    chat_template_kwargs: dict[str, Any] = _key(
        {},
        "variables of the chat template for every prompt, such as {enable_thinking: false}; a prompt's own come first",
    )
    date: str | None = _key(
        None,
        "what a chat template takes for today (YYYY-MM-DD); default: today, in training the day of its first start",
    )
    check_compatibility: bool = _key(True, "refuse a teacher whose vocabulary differs from the student's")


_FILES = "str | list[str] | null"  # OmegaConf knows no union with a list: such keys are declared as Any


@dataclass
class ColumnsConfig:
    """`data.columns.*`: the columns of data.prompts, and of the other files as far as they have them."""

    prompt: str | None = _key(None, "column of the prompt: a string (one user message) or a list of messages")
    messages: str | None = _key(None, "column of the conversation")
    text: str | None = _key(None, "column of the raw prompt, to which no chat template is applied")
    system: str | None = _key(None, "column of the system message; default: system or system_prompt")
    answer: str | None = _key(None, "column of the answer; a.b is field b of the objects in column a")
    id: str | None = _key(None, "column of the id; default: id, else the line's number")
    teacher_response: str | None = _key(None, "column of the teacher's response")
    finish_reason: str | None = _key(None, "column of why that response ended; length: it was cut, so no EOS follows")
    domain: str | None = _key(None, "column of the domain")
    tools: str | None = _key(None, "column of the tools that the chat template describes")


@dataclass
class DataConfig:
    """`data.*`."""

    prompts: Any = _key(
        None,
        "prompts: a JSONL, JSON, CSV, Parquet or Arrow file, a folder of save_to_disk, a pattern, or a list of these",
        takes=_FILES,
    )
    columns: ColumnsConfig = field(
        default_factory=ColumnsConfig, metadata={"help": "columns by role; default: the common layouts are recognised"}
    )
    weights: list[float] = _key(
        [], "sampling proportions, one per entry of prompts; default: each prompt once per epoch"
    )
    seed: int = _key(0, "seed of the prompt order")
    shuffle: bool = _key(True, "draw a new order of the prompts each epoch")
    max_prompt_tokens: int | None = _key(
        None, "longest prompt; default: what max_new_tokens leaves of the context", low=1
    )
    skip_long_prompts: bool = _key(False, "leave out longer prompts and count them, instead of refusing the file")
    deduplicate: bool = _key(False, "leave out prompts that stand in an earlier row; false: only count them")
    assistant_turn: str = _key(
        "response",
        "an assistant's turn at the end of a conversation: response: it is the teacher_response; refuse: an error",
        ("response", "refuse"),
    )


@dataclass
class RolloutConfig:
    """`rollout.*`."""

    samples_per_prompt: int = _key(4, "responses a prompt", low=1)
    max_new_tokens: int = _key(8096, "longest response, prefix included", low=1)
    temperature: float = _key(1.0, "sampling temperature; 0 is greedy", low=0)
    top_k: int = _key(0, "sample among the k most probable tokens; 0: all", low=0)
    top_p: float = _key(1.0, "sample from the nucleus of this mass; 1: all", above=0, high=1)
    stop: list[str] = _key([], "strings that end a response; a special token ends it as EOS does and is exported so")
    engine: str = _key("auto", "Megatron inference engine", ("auto", "dynamic", "static"))
    attention: str = _key(
        "auto",
        "attention of rollouts on CUDA; flash: flash-attn; plain: our Triton kernel and torch's own attention; "
        "auto: flash if flash-attn supports the model, else plain",
        ("auto", "flash", "plain"),
    )
    cuda_graphs: str = _key("auto", "replay decode steps as CUDA graphs (on CUDA)", ("auto", "off"))
    max_batch_size: int = _key(256, "responses generated at the same time on one data-parallel rank", low=1)
    kv_cache_gb: float | str | None = _key(
        "auto",
        "GiB of the paged KV cache per GPU; null: what max_batch_size full-length responses need; auto: the same, but "
        "at most the free memory",
        words=("auto",),
        above=0,
    )


@dataclass
class GuidanceConfig:
    """`guidance.*`: prefixes written by the teacher (part C of the method)."""

    schedule: str = _key("cosine", "prefix share over the steps", ("cosine", "linear", "constant", "none"))
    start: float = _key(1.0, "share of the teacher's response at step 0, in [0, 1]", low=0, high=1)
    beta: float = _key(0.001, "weight of the loss on prefix tokens", low=0)
    responses: Any = _key(
        None, "files of teacher responses (id, teacher_response); default: data.prompts' own", takes=_FILES
    )


@dataclass
class ObjectiveConfig:
    """`objective.*`: parts A and B of the method."""

    name: str = _key("tropd", "objective by name; see objectives.py")
    gate: str | None = _key(None, "trust gate; default: the objective's own", ("bernoulli", "threshold", "soft"))
    gate_threshold: float = _key(0.5, "tau of the `threshold` gate: in the region where rho >= tau", low=0, high=1)
    outlier: str | None = _key(
        None, "loss outside the region; default: the objective's own", ("fkl", "mask", "clip", "fkl_advantage")
    )
    topk: int = _key(64, "k of the teacher's top-k", low=1)
    tail: str = _key("truncated", "mass outside the top-k", ("truncated", "renormalized", "tail"))
    clip: float = _key(-2.0, "tau of `clip`: lowest advantage, nats")
    beta: float = _key(0.5, "the teacher's weight in the mixture of `jsd`", low=0, high=1)
    temperature: float = _key(1.0, "both models' logits are divided by it in every loss and gate", above=0)
    importance: str = _key("tis", "correction for pi_student / pi_old", ("off", "tis", "icepop"))
    importance_cap: float = _key(2.0, "C of the truncated importance weight", above=0)
    kernel: str = _key("auto", "implementation of the log-prob kernels", ("auto", "triton", "chunked", "reference"))


@dataclass
class TrainingConfig:
    """`training.*`."""

    steps: int = _key(200, "optimizer steps", low=1)
    exit_step: int | None = _key(None, "save and stop after this step, though the schedules go on to `steps`", low=1)
    prompts_per_step: int = _key(128, "prompts of a step, over all data-parallel ranks", low=1)
    micro_batch_size: int = _key(1, "sequences a forward pass", low=1)
    max_tokens_per_micro_batch: int | str | None = _key(
        "auto",
        "pack sequences up to this many tokens per micro-batch; null: pad micro_batch_size sequences instead; auto: "
        "with Transformer Engine, pack up to the tokens of micro_batch_size sequences of the greatest length; else pad",
        words=("auto",),
        low=1,
    )
    optimizer: str = _key("adam", "Megatron optimizer (adam is AdamW)", ("adam", "sgd"))
    lr: float = _key(5e-6, "peak learning rate", low=0, high=1e6)
    min_lr: float | None = _key(None, "lowest learning rate of a decaying schedule; default: 0", low=0)
    lr_schedule: str = _key("constant", "decay after the warm-up", ("constant", "linear", "cosine"))
    lr_warmup_steps: int = _key(0, "steps of linear warm-up", low=0)
    weight_decay: float = _key(0.1, "decoupled weight decay", low=0)
    adam_beta1: float = _key(0.9, "Adam's beta1", low=0, high=1)
    adam_beta2: float = _key(0.999, "Adam's beta2", low=0, high=1)
    adam_eps: float = _key(1e-8, "Adam's epsilon", above=0)
    clip_grad: float = _key(1.0, "largest global gradient norm; 0: off", low=0)
    on_nan: str = _key(
        "stop",
        "where scores, log-probs, loss or gradient are not finite, there is no update: end the run with a message, or "
        "skip the step",
        ("stop", "skip"),
    )
    max_skipped_steps: int = _key(10, "steps skipped (on_nan, spikes) before the run ends all the same", low=0)
    loss_spike_factor: float | None = _key(
        None, "skip a step whose mean loss is so many times the usual one, in absolute values; null: none", above=1
    )
    grad_norm_spike_factor: float | None = _key(
        None, "skip a step whose gradient norm, before clipping, is so many times the usual one; null: none", above=1
    )
    spike_window: int = _key(50, "the usual is the median of so many steps with an update before", low=1)
    seed: int = _key(1234, "seed of sampling, gate and dropout")
    deterministic: bool = _key(
        False, "reproducible algorithms on GPUs: the same run on the same machines gives the same bits, more slowly"
    )
    use_distributed_optimizer: bool = _key(True, "shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = _key(False, "reduce gradients over the data-parallel ranks during the backward pass")
    overlap_param_gather: bool = _key(False, "gather updated parameters while the next forward pass begins")
    timeout_minutes: int = _key(
        30, "minutes that a rank waits for others in a collective, such as for the slowest replica's rollout", low=1
    )
    offload_optimizer: bool = _key(
        False, "outside of updates keep the optimizer's state in host memory and free the gradients (not in float32)"
    )


@dataclass
class CheckpointConfig:
    """`checkpoint.*`."""

    dir: str | None = _key(None, "folder of the run's checkpoints; default: logging.dir/checkpoints")
    save_interval: int = _key(50, "steps between checkpoints; 0: only at the end and at SIGTERM", low=0)
    keep: int = _key(2, "newest checkpoints kept; 0: all", low=0)
    resume: bool = _key(True, "continue from the newest whole checkpoint of `dir`, if there is one")


@dataclass
class EvaluationConfig:
    """`evaluation.*`."""

    problems: Any = _key(None, "files of problems with answers", takes=_FILES)
    held_out: Any = _key(None, "files of prompts: forward KL to the teacher before and after training", takes=_FILES)
    held_out_responses: Any = _key(None, "files of teacher responses to held_out; default: its own", takes=_FILES)
    interval: int = _key(0, "steps between evaluations; 0: none during training", low=0)
    samples: int = _key(1, "samples a problem; the accuracy is their mean", low=1)
    temperature: float = _key(0.0, "sampling temperature; 0 is greedy", low=0)
    top_k: int | None = _key(None, "sample among the k most probable; default: rollout.top_k", low=0)
    top_p: float | None = _key(None, "sample from this nucleus; default: rollout.top_p", above=0, high=1)
    stop: list[str] | None = _key(None, "strings that end a response; default: rollout.stop")
    max_new_tokens: int | None = _key(None, "longest response; default: rollout.max_new_tokens", low=1)
    answer_pattern: str = _key(
        "auto",
        "regex whose last match's group 1 is the answer; auto: boxed, ####, what follows 'answer is', last number",
    )
    grader: str = _key(
        "auto",
        "how answers are compared; math: as numbers, forms and algebra; multiple_choice: the option's letter; exact: "
        "as text but for case, spaces and a full stop; auto: math",
        ("auto", "math", "multiple_choice", "exact"),
    )
    grader_timeout: float = _key(5.0, "CPU seconds after which a comparison counts as wrong", above=0)


@dataclass
class LoggingConfig:
    """`logging.*`."""

    dir: str = _key("runs/default", "the run's folder: recipe.yaml, metrics.jsonl, summary.json, checkpoints/")
    tensorboard: bool = _key(True, "write TensorBoard events to dir/tensorboard")
    samples: int = _key(2, "rollouts a step written to samples.jsonl, tokens with their gate; 0: none", low=0)
    answers: int = _key(32, "problems whose graded responses each evaluation writes to answers.jsonl; 0: none", low=0)


@dataclass
class Recipe:
    """A whole recipe."""

    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# What the checks of a recipe must know about objectives by name (objectives.py defines them).
DATA_OBJECTIVES = ("sft", "seqkd")  # train on written responses: no teacher model, no rollouts
UNGUIDED_OBJECTIVES = (
    *("opd", "mask_outlier", "clip_outlier", "fkl_outlier", "fkl_topk", "rkl_full", "fkl_full", "jsd"),
    *("entropy_opd", "eopd", "reopold", "topd", *DATA_OBJECTIVES),
)
