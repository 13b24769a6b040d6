"""The recipe's keys: one tree of typed dataclasses, each key with its default, its documentation and its range.

Every key is documented here, once; defaults are the paper's (arXiv 2606.01249, experiments) wherever the paper names
a value. `recipe.py` reads, overrides and checks recipes.

    recipe = load_recipe("tropd_paper", ["training.steps=10", "student.tensor_model_parallel_size=2"])
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.config_key import FILES
from megatron_tropd.config_key import key as _key
from megatron_tropd.config_outputs import CheckpointConfig, EvaluationConfig, LoggingConfig
from megatron_tropd.methods import METHODS


@dataclass
class ModelConfig:
    """`student.*`, and the keys of `teacher.*` that are the same."""

    hf_path: str | None = _key(None, "Hugging Face folder: config.json, tokenizer and (if no checkpoint) weights")
    checkpoint: str | None = _key(None, "Megatron distributed checkpoint of the weights; default: convert hf_path's")
    tensor_model_parallel_size: int = _key(1, "ranks that share each layer's matrices", low=1)
    pipeline_model_parallel_size: int = _key(1, "pipeline stages", low=1)
    virtual_pipeline_model_parallel_size: int | None = _key(None, "model chunks per stage (interleaved)", low=2)
    num_layers_in_first_pipeline_stage: int | None = _key(
        None, "layers in the first stage, if it differs from the others", low=1
    )
    num_layers_in_last_pipeline_stage: int | None = _key(
        None, "layers in the last stage, if it differs from the others", low=1
    )
    account_for_embedding_in_pipeline_split: bool = _key(False, "count the embedding as a layer of the first stage")
    account_for_loss_in_pipeline_split: bool = _key(False, "count output layer and loss as a layer of the last stage")
    context_parallel_size: int = _key(1, "ranks that share each sequence", low=1)
    expert_model_parallel_size: int = _key(1, "ranks over which the MoE experts are distributed", low=1)
    expert_tensor_parallel_size: int | None = _key(
        None, "ranks that share each expert's matrices; default: tensor_model_parallel_size", low=1
    )
    sequence_parallel: bool = _key(False, "shard activations outside attention and MLP over the tensor-parallel ranks")
    dtype: str = _key(
        "bfloat16",
        "parameters and activations; auto: bfloat16 on CUDA, and on a CPU the faster of bfloat16 and float32, which is "
        "measured when the run first starts and kept when it is resumed",
        ("auto", "float32", "bfloat16", "float16"),
    )
    fp8: str | None = _key(
        None,
        "Transformer Engine's 8-bit format for matrix products in training and scoring (rollouts stay in dtype)",
        ("e4m3", "hybrid"),
    )
    fp8_recipe: str = _key(
        "tensorwise",
        "scaling of fp8: one scale per tensor or per block; mxfp8 requires Blackwell",
        ("tensorwise", "blockwise", "mxfp8"),
    )
    recompute: str | None = _key(
        None,
        "activations recomputed in the backward pass; selective: of MLPs and MoE experts (without Transformer Engine: "
        "of attention, which otherwise stores its probabilities); full: of whole layers",
        ("selective", "full"),
    )
    verify: str = _key(
        "auto",
        "before training from hf_path: compare a few layers, embedding and output layer with transformers (fp32)",
        ("auto", "off"),
    )


@dataclass
class TeacherConfig(ModelConfig):
    """`teacher.*`: what only a frozen model can do, beside the keys of every model."""

    offload: bool = _key(False, "keep the weights in host memory between passes")
    ranks: str = _key(
        "shared",
        "shared: both models take turns on the same ranks; dedicated: the teacher has the last ranks of the job",
        ("shared", "dedicated"),
    )
    replicas: int = _key(1, "with ranks=dedicated: replicas of the teacher that split each batch", low=1)


@dataclass
class TokenizerConfig:
    """`tokenizer.*`."""

    path: str | None = _key(None, "Hugging Face folder or sentencepiece .model file; default: the student's hf_path")
    chat_template: str | None = _key(None, "file with a Jinja chat template that replaces the tokenizer's own")
    chat_template_kwargs: dict[str, Any] = _key(
        {},
        "variables of the chat template for every prompt, such as {enable_thinking: false}; a row's own override it",
    )
    date: str | None = _key(
        None,
        "current date for the chat template (YYYY-MM-DD); default: today, or the day on which the run first started",
    )
    check_compatibility: bool = _key(True, "refuse a teacher whose vocabulary differs from the student's")


@dataclass
class ColumnsConfig:
    """`data.columns.*`: columns of data.prompts, and of the other files where they exist."""

    prompt: str | None = _key(None, "column of the prompt: a string (one user message) or a list of messages")
    messages: str | None = _key(None, "column of the conversation")
    text: str | None = _key(None, "column of the raw prompt, to which no chat template is applied")
    system: str | None = _key(None, "column of the system message; default: system or system_prompt")
    answer: str | None = _key(None, "column of the answer; a.b is field b of the objects in column a")
    id: str | None = _key(None, "column of the id; default: id, else the line number")
    teacher_response: str | None = _key(None, "column of the teacher's response")
    finish_reason: str | None = _key(None, "column of its finish reason; length: truncated, so no EOS is added")
    domain: str | None = _key(None, "column of the domain")
    tools: str | None = _key(None, "column of the tools that the chat template describes")


@dataclass
class DataConfig:
    """`data.*`."""

    prompts: Any = _key(
        None,
        "prompts: a JSONL, JSON, CSV, Parquet or Arrow file, a save_to_disk folder, a glob pattern, or a list of these",
        takes=FILES,
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
        None, "longest prompt, in tokens; default: context length minus max_new_tokens", low=1
    )
    skip_long_prompts: bool = _key(False, "skip and count longer prompts instead of refusing the file")
    deduplicate: bool = _key(False, "skip prompts that repeat an earlier row; false: only count them")
    assistant_turn: str = _key(
        "response",
        "an assistant turn at the end of a conversation; response: use it as the teacher_response; refuse: an error",
        ("response", "refuse"),
    )


_FILTERING = ("keep", "drop", "mask", "downweight")


@dataclass
class RolloutConfig:
    """`rollout.*`."""

    samples_per_prompt: int = _key(4, "responses per prompt", low=1)
    max_new_tokens: int = _key(8096, "longest response in tokens, including the teacher prefix", low=1)
    temperature: float = _key(1.0, "sampling temperature; 0 is greedy", low=0)
    top_k: int = _key(0, "sample from the k most probable tokens; 0: all", low=0)
    top_p: float = _key(1.0, "nucleus sampling with this probability mass; 1: all", above=0, high=1)
    stop: list[str] = _key([], "strings that end a response; special tokens act as EOS and are exported as EOS")
    engine: str = _key("auto", "Megatron inference engine", ("auto", "dynamic", "static"))
    attention: str = _key(
        "auto",
        "attention in rollouts on CUDA; flash: flash-attn; plain: our Triton kernel and torch's own attention; "
        "auto: flash if flash-attn supports the model, else plain",
        ("auto", "flash", "plain"),
    )
    cuda_graphs: str = _key("auto", "replay decode steps as CUDA graphs (on CUDA)", ("auto", "off"))
    max_batch_size: int = _key(256, "responses generated at the same time per data-parallel rank", low=1)
    kv_cache_gb: float | str | None = _key(
        "auto",
        "GiB of paged KV cache per GPU; null: as max_batch_size full-length responses need; auto: the same, but at "
        "most the free memory",
        words=("auto",),
        above=0,
    )

    on_truncated: str = _key(
        "keep",
        "what becomes of responses that max_new_tokens cuts; drop: no loss; mask: a loss of zero that counts in the "
        "mean; downweight: `downweight` times the loss",
        _FILTERING,
    )
    on_repeating: str = _key("keep", "what becomes of responses that repeat themselves (repetition_above)", _FILTERING)
    on_empty: str = _key("keep", "what becomes of responses without text", _FILTERING)
    on_duplicate: str = _key("keep", "what becomes of responses that equal an earlier one to the prompt", _FILTERING)
    downweight: float = _key(0.5, "factor of the losses of responses to `downweight`", low=0, high=1)
    repetition_ngram: int = _key(8, "n: a response repeats itself by its n-grams of tokens", low=1)
    repetition_above: float = _key(
        0.5, "a response is repeating if more than this share of its n-grams occurred in it before", low=0, high=1
    )


@dataclass
class GuidanceConfig:
    """`guidance.*`: prefixes from teacher responses (part C of the method)."""

    schedule: str = _key("cosine", "schedule of the prefix share", ("cosine", "linear", "constant", "none"))
    start: float = _key(1.0, "share of the teacher's response given as prefix at step 0", low=0, high=1)
    beta: float = _key(0.001, "weight of the loss on prefix tokens", low=0)
    responses: Any = _key(
        None, "files of teacher responses (id, teacher_response); default: those in data.prompts", takes=FILES
    )


_MASKS = ("reward", "entropy", "none")


@dataclass
class ObjectiveConfig:
    """`objective.*`: parts A and B of the method."""

    name: str = _key(
        "tropd",
        "the loss; `megatron-tropd train --help-keys objective` explains each of them and when to use it",
        tuple(METHODS),
    )
    gate: str | None = _key(None, "trust gate; default: the objective's own", ("bernoulli", "threshold", "soft"))
    gate_threshold: float = _key(0.5, "tau of the `threshold` gate: tokens with rho >= tau are trusted", low=0, high=1)
    outlier: str | None = _key(
        None, "loss outside the region; default: the objective's own", ("fkl", "mask", "clip", "fkl_advantage")
    )
    topk: int | None = _key(
        None, "number of the teacher's most probable tokens in the forward KL; default: 64, for eopd 16", low=1
    )
    tail: str = _key("truncated", "what happens to the mass outside the top-k", ("truncated", "renormalized", "tail"))
    clip: float = _key(-2.0, "tau of `clip`: lowest advantage, in nats")
    beta: float = _key(0.5, "the teacher's weight in the mixture of `jsd`", low=0, high=1)
    alpha: float = _key(0.2, "alpha of `topd`: the teacher's weight in the reward's mixture", above=0, high=0.999)
    ppo_clip: float = _key(0.2, "epsilon of `eopd` and `topd`: bounds the ratio to the rollout's policy", above=0)
    entropy_above: float = _key(0.8, "tau of `eopd`, in nats: above it the teacher is uncertain", low=0)
    entropy_weight: float = _key(1.0, "lambda of `eopd`: weight of the forward KL on those tokens", low=0)
    entropy_share: float = _key(
        0.2, "beta of `entropy_opd` and `reopold`: learned share of the tokens, of the highest entropy", above=0, high=1
    )
    mixture: float = _key(
        0.2, "lambda of `reopold`: rewards are floored at log(lambda / (1 - lambda)) nats", above=0, high=0.5
    )
    exploration_steps: int | None = _key(
        None, "steps of `reopold` before refinement begins; default: half of training.steps at the run's start", low=0
    )
    exploration_mask: str = _key(
        "reward", "tokens that `reopold` learns at first: with a reward above the floor, or uncertain", _MASKS
    )
    refinement_mask: str = _key("entropy", "tokens that `reopold` learns after exploration", _MASKS)
    temperature: float = _key(1.0, "divisor of both models' logits in every loss and gate", above=0)
    importance: str = _key("tis", "correction for the ratio pi_student / pi_old", ("off", "tis", "icepop"))
    importance_cap: float = _key(2.0, "C of the truncated importance weight", above=0)
    kernel: str = _key("auto", "implementation of the log-prob kernels", ("auto", "triton", "chunked", "reference"))


@dataclass
class TrainingConfig:
    """`training.*`."""

    steps: int = _key(200, "optimizer steps", low=1)
    exit_step: int | None = _key(None, "save and stop after this step; schedules still extend to `steps`", low=1)
    prompts_per_step: int = _key(128, "prompts per step, over all data-parallel ranks", low=1)
    micro_batch_size: int = _key(1, "sequences per forward pass", low=1)
    max_tokens_per_micro_batch: int | str | None = _key(
        "auto",
        "pack sequences up to this many tokens per micro-batch; null: pad micro_batch_size sequences instead; auto: "
        "with Transformer Engine, pack up to the tokens of micro_batch_size full-length sequences; else pad",
        words=("auto",),
        low=1,
    )
    optimizer: str = _key("adam", "Megatron optimizer (adam is AdamW)", ("adam", "sgd"))
    lr: float = _key(5e-6, "peak learning rate", low=0, high=1e6)
    min_lr: float | None = _key(None, "final learning rate of a decaying schedule; default: 0", low=0)
    lr_schedule: str = _key("constant", "decay after the warm-up", ("constant", "linear", "cosine"))
    lr_warmup_steps: int = _key(0, "steps of linear warm-up", low=0)
    weight_decay: float = _key(0.1, "decoupled weight decay", low=0)
    adam_beta1: float = _key(0.9, "Adam's beta1", low=0, high=1)
    adam_beta2: float = _key(0.999, "Adam's beta2", low=0, high=1)
    adam_eps: float = _key(1e-8, "Adam's epsilon", above=0)
    clip_grad: float = _key(1.0, "largest global gradient norm; 0: off", low=0)
    on_nan: str = _key(
        "stop",
        "if scores, log-probs, loss or gradient are not finite, make no update; stop: end the run with a message; "
        "skip: go on with the next step",
        ("stop", "skip"),
    )
    max_skipped_steps: int = _key(10, "most steps that may be skipped (on_nan, spikes); one more ends the run", low=0)
    loss_spike_factor: float | None = _key(
        None, "skip steps whose absolute mean loss exceeds this multiple of the median; null: off", above=1
    )
    grad_norm_spike_factor: float | None = _key(
        None, "skip steps whose gradient norm, before clipping, exceeds this multiple of the median; null: off", above=1
    )
    spike_window: int = _key(50, "number of earlier updates over which that median is taken", low=1)
    seed: int = _key(1234, "seed of sampling, gate and dropout")
    deterministic: bool = _key(
        False, "reproducible algorithms on GPUs: the same run on the same machines is bit-identical, but slower"
    )
    use_distributed_optimizer: bool = _key(True, "shard optimizer state over the data-parallel ranks")
    overlap_grad_reduce: bool = _key(False, "reduce gradients over the data-parallel ranks during the backward pass")
    overlap_param_gather: bool = _key(False, "gather updated parameters while the next forward pass begins")
    timeout_minutes: int = _key(
        30, "minutes to wait for other ranks in a collective, for example for the slowest replica's rollout", low=1
    )
    offload_optimizer: bool = _key(
        False, "between updates, keep the optimizer state in host memory and free the gradients (not with float32)"
    )


@dataclass
class Recipe:
    """A whole recipe."""

    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    guidance: GuidanceConfig = field(default_factory=GuidanceConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
