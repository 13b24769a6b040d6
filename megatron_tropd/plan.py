"""Memory of one GPU by part, and seconds of one step, from two Hugging Face configs and a layout; nothing is loaded.

What is resident is exact (weights, gradients, optimizer, KV cache); activations follow what Megatron's layers keep for
the backward pass. Times are estimates from arithmetic and bandwidth. The pipeline stage with the most memory counts.

    job = Job(student_config, teacher_config, recipe, gpus=8)
    memory(job).peak, step_seconds(job, Accelerator())
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tropd.config import ModelConfig, Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.experts import experts_of
from megatron_tropd.model import check_sizes, head_dim, padded_vocab_size
from megatron_tropd.plan_model import (
    BYTES,
    active_parameters,
    expert_ranks,
    layer_activations,
    mlp_width,
    model_ranks,
    stage_kinds,
    stage_parameters,
    whole_parameters,
)

_KV_BLOCK = 256  # tokens of a block of the paged cache on CUDA


@dataclass(frozen=True)
class Accelerator:
    """What a GPU can do; the defaults are an H100's, at the shares that Megatron reaches in practice."""

    memory_gb: float = 80.0
    reserve_gb: float = 4.0  # CUDA context, NCCL, fragmentation
    flops: float = 989e12 * 0.4  # dense bf16, reached in large matrix products of training
    bandwidth: float = 3.35e12 * 0.7  # bytes a second, reached while decoding

    @property
    def room_gb(self) -> float:
        """What a plan may fill."""
        return self.memory_gb - self.reserve_gb


@dataclass(frozen=True)
class Job:
    """Two models and a recipe on a number of GPUs; lengths are the longest that the recipe allows."""

    student: Any  # Hugging Face configs
    teacher: Any
    recipe: Recipe
    gpus: int
    prompt_tokens: int = 512
    fused_attention: bool = True  # False: Megatron's local layers, as on a CPU

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.recipe.rollout.max_new_tokens

    def replicas(self, model: ModelConfig) -> int:
        """Data-parallel size of a model."""
        return self.gpus // model_ranks(model)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch, padding included, before context parallelism splits them."""
        training = self.recipe.training
        return training.max_tokens_per_micro_batch or training.micro_batch_size * self.sequence

    @property
    def rows(self) -> int:
        """Sequences of a student replica in a step."""
        rollout = self.recipe.rollout
        return self.recipe.training.prompts_per_step * rollout.samples_per_prompt // self.replicas(self.recipe.student)


def _in_flight(model: ModelConfig, stage: int, micro_batches: int) -> float:
    """Return how many micro-batches' activations of a whole stage are held at once (1F1B, or interleaved)."""
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp) / vpp


@dataclass
class Memory:
    """Bytes of the fullest GPU, by part; which parts are there at the same time is the phase's."""

    stage: int
    offloaded: tuple[str, ...] = ()  # parts that are there in their own phase alone
    parts: dict[str, float] = field(default_factory=dict)

    _PHASES = {
        "rollout": ("KV cache",),
        "teacher scores": ("batch and scores", "teacher activations", "teacher logits"),
        "update": ("batch and scores", "activations", "logits"),
    }

    _OWN_PHASE = {
        "student weights": None,
        "student gradients": "update",
        "optimizer": "update",
        "teacher weights": "teacher scores",
    }

    @property
    def phases(self) -> dict[str, float]:
        """Bytes at the peak of each phase of a step."""
        found = {}
        for phase, names in self._PHASES.items():
            lasting = [n for n, own in self._OWN_PHASE.items() if n not in self.offloaded or own == phase]
            found[phase] = sum(self.parts[name] for name in (*lasting, *names))
        return found

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return max(self.phases.values())


def memory(job: Job) -> Memory:
    """Return the memory of the fullest pipeline stage."""
    student, teacher = job.recipe.student, job.recipe.teacher
    count = max(student.pipeline_model_parallel_size, teacher.pipeline_model_parallel_size)
    # Stages of both models are dealt to the same ranks in blocks: rank block i of `count`.
    places = [
        (i * student.pipeline_model_parallel_size // count, i * teacher.pipeline_model_parallel_size // count)
        for i in range(count)
    ]
    return max((_stage_memory(job, s, t) for s, t in places), key=lambda found: found.peak)


def _stage_memory(job: Job, student_stage: int, teacher_stage: int) -> Memory:
    training, model, teacher = job.recipe.training, job.recipe.student, job.recipe.teacher
    hf, size = job.student, BYTES[model.dtype]
    parameters = stage_parameters(hf, model)[student_stage]
    kinds = stage_kinds(hf, model)[student_stage]
    states = 8 if size == 4 else 12  # Adam's moments, and fp32 main weights where the model has none
    states = states if training.optimizer == "adam" else states - 8
    shards, expert_shards = 1, 1
    if training.use_distributed_optimizer:
        shards = job.replicas(model) * model.context_parallel_size
        expert_shards = job.gpus // expert_ranks(model)
    tokens = job.micro_batch_tokens / model.context_parallel_size
    a_stage = sum(
        count * layer_activations(hf, model, job.sequence, job.fused_attention, sparse)
        for sparse, count in kinds.items()
    )
    in_flight = _in_flight(model, student_stage, max(1, job.rows * job.sequence // job.micro_batch_tokens))
    found = Memory(student_stage, _offloaded(job.recipe))
    found.parts = {
        "student weights": parameters.total * size,
        "student gradients": parameters.total * 4,
        "optimizer": (parameters.shared / shards + parameters.experts / expert_shards) * states,
        "teacher weights": stage_parameters(job.teacher, teacher)[teacher_stage].total * BYTES[teacher.dtype],
        "batch and scores": job.rows * job.sequence * (41 + 12 * job.recipe.objective.topk),
        "KV cache": _kv_cache(job, kinds.total()),
        "activations": tokens * (a_stage * in_flight + _once(job, kinds[True] > 0)),
        "logits": _logits(hf, model, tokens, student_stage),
    }
    scored = job.micro_batch_tokens / teacher.context_parallel_size
    whole = replace(teacher, recompute=None)
    sparse = experts_of(job.teacher) is not None
    a_teacher = layer_activations(job.teacher, whole, job.sequence, job.fused_attention, sparse)
    found.parts["teacher activations"] = scored * a_teacher  # forward only: one layer at a time
    found.parts["teacher logits"] = _logits(job.teacher, teacher, scored, teacher_stage)
    return found


def _offloaded(recipe: Recipe) -> tuple[str, ...]:
    optimizer = ("student gradients", "optimizer") if recipe.training.offload_optimizer else ()
    return (*optimizer, *(("teacher weights",) if recipe.teacher.offload else ()))


def _once(job: Job, sparse: bool) -> float:
    """Return the bytes a token of what is held once: a recomputed layer, and gradients within a layer."""
    hf, model = job.student, job.recipe.student
    tp, size = model.tensor_model_parallel_size, BYTES[model.dtype]
    whole = replace(model, recompute=None)
    again = layer_activations(hf, whole, job.sequence, job.fused_attention, sparse) if model.recompute else 0.0
    ffn = mlp_width(hf, sparse) / tp * size
    if job.fused_attention:
        return again + 3 * ffn
    # Gradients of probabilities and scores, when what the MLP kept is freed already.
    attention = 2 * hf.num_attention_heads / tp * job.sequence * 4 - 5 * ffn
    return again + max(3 * ffn, attention)


def _logits(hf: Any, model: ModelConfig, tokens: float, stage: int) -> float:
    if stage < model.pipeline_model_parallel_size - 1:
        return 0.0
    tp = model.tensor_model_parallel_size
    return tokens * padded_vocab_size(hf.vocab_size, tp) // tp * BYTES[model.dtype]  # their gradient overwrites them


def _kv_cache(job: Job, layers: int) -> float:
    rollout, model = job.recipe.rollout, job.recipe.student
    if rollout.kv_cache_gb:
        return rollout.kv_cache_gb * 2**30
    token = 2 * job.student.num_key_value_heads // model.tensor_model_parallel_size * head_dim(job.student)
    blocks = min(job.rows, rollout.max_batch_size) * -(-job.sequence // _KV_BLOCK) + 2
    return blocks * _KV_BLOCK * token * layers * BYTES[model.dtype]


def step_seconds(job: Job, gpu: Accelerator) -> dict[str, float]:
    """Estimate the seconds of a step's stages; responses are taken to reach their longest length."""
    student, teacher = job.recipe.student, job.recipe.teacher
    return {
        "rollout": _rollout_seconds(job, gpu),
        "teacher scores": _pass_seconds(job, job.teacher, teacher, gpu, passes=1),
        "update": _pass_seconds(job, job.student, student, gpu, passes=4 if student.recompute == "full" else 3),
    }


def _pass_seconds(job: Job, hf: Any, model: ModelConfig, gpu: Accelerator, passes: int) -> float:
    """Return the time of forward passes (a backward pass is two) over the step's tokens, pipeline bubble included."""
    total = job.rows * job.replicas(job.recipe.student) * job.sequence
    attention = 2 * hf.num_hidden_layers * hf.num_attention_heads * head_dim(hf) * job.sequence  # causal: half of 4
    flops = passes * total * (2 * active_parameters(hf) + attention)
    micro_batches = max(1, total // job.replicas(model) // job.micro_batch_tokens)
    vpp = model.virtual_pipeline_model_parallel_size or 1
    bubble = (model.pipeline_model_parallel_size - 1) / (micro_batches * vpp)
    return flops / (job.gpus * gpu.flops) * (1 + bubble)


def _rollout_seconds(job: Job, gpu: Accelerator) -> float:
    """Return the time to decode: each token reads the weights and the cache; pipeline stages wait for one another."""
    rollout, model, hf = job.recipe.rollout, job.recipe.student, job.student
    batch = min(job.rows, rollout.max_batch_size)
    waves = -(-job.rows // batch)
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    whole = whole_parameters(hf)  # a batch meets all experts; a rank reads its own
    weights = BYTES[model.dtype] * (whole.shared / tp + whole.experts / expert_ranks(model) * pp)
    length = job.prompt_tokens + rollout.max_new_tokens / 2
    token = 2 * hf.num_key_value_heads * head_dim(hf) * hf.num_hidden_layers * BYTES[model.dtype] / tp
    a_step = max((weights + batch * length * token) / gpu.bandwidth, 2 * active_parameters(hf) / tp * batch / gpu.flops)
    return waves * rollout.max_new_tokens * a_step


def layouts(hf: Any, model: ModelConfig, gpus: int, node: int = 8) -> Iterator[ModelConfig]:
    """Yield the layouts of a model that its sizes and the number of GPUs allow: TP within a node, then PP.

    Experts stay whole, and are either on every rank or dealt out over as many ranks of a node as divide them.
    """
    experts = experts_of(hf)
    for tp, pp in itertools.product(*[[2**i for i in range(11)]] * 2):
        if tp > node or gpus % (tp * pp):
            continue
        plain = dict.fromkeys(("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"))
        found = replace(model, **plain, virtual_pipeline_model_parallel_size=None, context_parallel_size=1)
        found = replace(found, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, sequence_parallel=tp > 1)
        try:
            check_sizes(hf, found, "model")
        except UserError:
            continue
        if experts is None:
            yield found
            continue
        for ep in {1, math.gcd(experts.count, min(node, gpus // pp))}:
            yield replace(found, expert_model_parallel_size=ep, expert_tensor_parallel_size=1)


def proposals(job: Job, gpu: Accelerator, count: int = 5) -> list[tuple[Job, Memory, float]]:
    """Return the fastest layouts that fit, with their memory and seconds a step; empty if none does."""
    fitting = []
    students = layouts(job.student, job.recipe.student, job.gpus)
    teachers = layouts(job.teacher, job.recipe.teacher, job.gpus)
    for student, teacher in itertools.product(students, teachers):
        for recompute in dict.fromkeys((job.recipe.student.recompute, "selective", "full")):
            recipe = replace(job.recipe, student=replace(student, recompute=recompute), teacher=teacher)
            other = replace(job, recipe=recipe)
            if recipe.training.prompts_per_step % other.replicas(student):
                continue
            needed = memory(other)
            if needed.peak <= gpu.room_gb * 1e9:
                fitting.append((other, needed, sum(step_seconds(other, gpu).values())))
                break
    return sorted(fitting, key=lambda found: found[2])[:count]
