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
from megatron_tropd.model import head_dim, padded_vocab_size
from megatron_tropd.model_checks import check_sizes
from megatron_tropd.parallel import model_ranks
from megatron_tropd.partition import has_dedicated_teacher, student_size, teacher_size
from megatron_tropd.plan_model import (
    BYTES,
    active_parameters,
    expert_ranks,
    layer_activations,
    mlp_width,
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

    @property
    def apart(self) -> bool:
        """Whether the teacher has GPUs of its own."""
        return has_dedicated_teacher(self.recipe)

    def gpus_of(self, role: str) -> int:
        """GPUs of the student or the teacher: all, or each its own."""
        if not self.apart:
            return self.gpus
        return teacher_size(self.recipe.teacher) if role == "teacher" else student_size(self.recipe, self.gpus)

    def replicas(self, role: str) -> int:
        """Data-parallel size of the student or the teacher."""
        return self.gpus_of(role) // model_ranks(getattr(self.recipe, role))

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch, padding included, before context parallelism splits them."""
        training = self.recipe.training
        return training.max_tokens_per_micro_batch or training.micro_batch_size * self.sequence

    @property
    def rows(self) -> int:
        """Sequences of a student replica in a step."""
        rollout = self.recipe.rollout
        return self.recipe.training.prompts_per_step * rollout.samples_per_prompt // self.replicas("student")


def _in_flight(model: ModelConfig, stage: int, micro_batches: int) -> float:
    """Return how many micro-batches' activations of a whole stage are held at once (1F1B, or interleaved)."""
    pp, vpp = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size or 1
    if vpp == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (vpp - 1) * pp + 1, micro_batches * vpp) / vpp


@dataclass
class Memory:
    """Bytes of the fullest GPU, by part; which parts are there at the same time is the phase's."""

    gpu: str  # which: "pipeline stage 0"
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
            found[phase] = sum(self.parts.get(name, 0.0) for name in (*lasting, *names))
        return found

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment."""
        return max(self.phases.values())


def memory(job: Job) -> Memory:
    """Return the memory of the fullest GPU."""
    return max(memories(job), key=lambda found: found.peak)


def memories(job: Job) -> list[Memory]:
    """Return the memory of the fullest pipeline stage; where each model has GPUs of its own, of both."""
    stages = {role: getattr(job.recipe, role).pipeline_model_parallel_size for role in ("student", "teacher")}
    if job.apart:
        kinds = [[(f"the {role}'s pipeline stage {i}", {role: i}) for i in range(n)] for role, n in stages.items()]
    else:
        # Stages of both models are dealt to the same ranks in blocks: rank block i of `count`.
        count = max(stages.values())
        places = [{role: i * n // count for role, n in stages.items()} for i in range(count)]
        kinds = [[(f"pipeline stage {place['student']}", place) for place in places]]
    return [max((_stage_memory(job, *place) for place in places), key=lambda found: found.peak) for places in kinds]


def _stage_memory(job: Job, gpu: str, stages: dict[str, int]) -> Memory:
    found = Memory(gpu, _offloaded(job.recipe))
    if "student" in stages:
        found.parts |= _student_parts(job, stages["student"])
    if "teacher" in stages:
        found.parts |= _teacher_parts(job, stages["teacher"])
    return found


def _student_parts(job: Job, stage: int) -> dict[str, float]:
    training, model, hf = job.recipe.training, job.recipe.student, job.student
    size = BYTES[model.dtype]
    parameters = stage_parameters(hf, model)[stage]
    kinds = stage_kinds(hf, model)[stage]
    states = 8 if size == 4 else 12  # Adam's moments, and fp32 main weights where the model has none
    states = states if training.optimizer == "adam" else states - 8
    shards, expert_shards = 1, 1
    if training.use_distributed_optimizer:
        shards = job.replicas("student") * model.context_parallel_size
        expert_shards = job.gpus_of("student") // expert_ranks(model)
    tokens = job.micro_batch_tokens / model.context_parallel_size
    a_stage = sum(
        count * layer_activations(hf, model, job.sequence, job.fused_attention, sparse)
        for sparse, count in kinds.items()
    )
    in_flight = _in_flight(model, stage, max(1, job.rows * job.sequence // job.micro_batch_tokens))
    return {
        "student weights": parameters.total * (size + (2 if model.fp8 else 0)),  # 8-bit copies, as is and transposed
        "student gradients": parameters.total * 4,
        "optimizer": (parameters.shared / shards + parameters.experts / expert_shards) * states,
        "batch and scores": job.rows * job.sequence * _token_bytes(job),
        "KV cache": _kv_cache(job, kinds.total()),
        "activations": tokens * (a_stage * in_flight + _once(job, kinds[True] > 0)),
        "logits": _logits(hf, model, tokens, stage),
    }


def _teacher_parts(job: Job, stage: int) -> dict[str, float]:
    model, hf = job.recipe.teacher, job.teacher
    tokens = job.micro_batch_tokens / model.context_parallel_size
    sparse = experts_of(hf) is not None
    fp8_copy = 1 if model.fp8 and not model.offload else 0
    a_layer = layer_activations(hf, replace(model, recompute=None), job.sequence, job.fused_attention, sparse)
    parts = {
        "teacher weights": stage_parameters(hf, model)[stage].total * (BYTES[model.dtype] + fp8_copy),
        "teacher activations": tokens * a_layer,  # forward only: one layer at a time
        "teacher logits": _logits(hf, model, tokens, stage),
    }
    if job.apart:
        rows = -(-job.rows * job.replicas("student") // job.replicas("teacher"))
        parts["batch and scores"] = rows * job.sequence * _token_bytes(job)
    return parts


def _token_bytes(job: Job) -> int:
    """Return the bytes of a batch's token with its scores."""
    return 41 + 12 * job.recipe.objective.topk


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
    return {
        "rollout": _rollout_seconds(job, gpu),
        "teacher scores": _pass_seconds(job, "teacher", gpu, passes=1),
        "update": _pass_seconds(job, "student", gpu, passes=4 if job.recipe.student.recompute == "full" else 3),
    }


def _pass_seconds(job: Job, role: str, gpu: Accelerator, passes: int) -> float:
    """Return the time of forward passes (a backward pass is two) over the step's tokens, pipeline bubble included."""
    hf, model = getattr(job, role), getattr(job.recipe, role)
    total = job.rows * job.replicas("student") * job.sequence
    attention = 2 * hf.num_hidden_layers * hf.num_attention_heads * head_dim(hf) * job.sequence  # causal: half of 4
    flops = passes * total * (2 * active_parameters(hf) + attention)
    micro_batches = max(1, total // job.replicas(role) // job.micro_batch_tokens)
    vpp = model.virtual_pipeline_model_parallel_size or 1
    bubble = (model.pipeline_model_parallel_size - 1) / (micro_batches * vpp)
    return flops / (job.gpus_of(role) * gpu.flops) * (1 + bubble)


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


def _layout_pairs(job: Job) -> Iterator[tuple[ModelConfig, ModelConfig]]:
    """Yield layouts of both models: on all GPUs, or, apart, on two parts of which one has 2^i GPUs."""
    powers = [2**i for i in range(job.gpus.bit_length()) if 2**i < job.gpus]
    sizes = {*powers, *(job.gpus - power for power in powers)} if job.apart else {None}
    for own in sizes:
        students = list(layouts(job.student, job.recipe.student, job.gpus - own if own else job.gpus))
        for teacher in layouts(job.teacher, job.recipe.teacher, own or job.gpus):
            teacher.replicas = own // model_ranks(teacher) if own else 1
            yield from ((student, teacher) for student in students)


def proposals(job: Job, gpu: Accelerator, count: int = 5) -> list[tuple[Job, Memory, float]]:
    """Return the fastest layouts that fit, with their memory and seconds a step; empty if none does."""
    fitting = []
    for student, teacher in _layout_pairs(job):
        for recompute in dict.fromkeys((job.recipe.student.recompute, "selective", "full")):
            recipe = replace(job.recipe, student=replace(student, recompute=recompute), teacher=teacher)
            other = replace(job, recipe=recipe)
            if recipe.training.prompts_per_step % other.replicas("student"):
                continue
            needed = memory(other)
            if needed.peak <= gpu.room_gb * 1e9:
                fitting.append((other, needed, sum(step_seconds(other, gpu).values())))
                break
    return sorted(fitting, key=lambda found: found[2])[:count]
