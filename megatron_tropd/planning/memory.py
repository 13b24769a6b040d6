"""Memory of one GPU by part, from two Hugging Face configs and a layout; nothing is loaded.

What is resident is exact (weights, gradients, optimizer, KV cache); activations follow what Megatron's layers keep for
the backward pass, or hold at their fullest without one; planning/runtime.py counts what is there beside tensors. The
pipeline stage with the most memory counts.

    memory(Job(student_config, teacher_config, recipe, gpus=8)).peak
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tropd.config import ModelConfig, Recipe
from megatron_tropd.kernels.linear import LOGITS_ELEMENTS
from megatron_tropd.mcore.engine_compat import MAX_PREFILL_TOKENS
from megatron_tropd.mcore.kv_cache import CPU_BLOCK_TOKENS, CUDA_BLOCK_TOKENS, cache_bytes, rounded_requests
from megatron_tropd.models.build import padded_vocab_size
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.runtime import runtime_parts
from megatron_tropd.planning.sizes import (
    BYTES,
    expert_ranks,
    forward_activations,
    layer_activations,
    layer_cache_bytes,
    mlp_width,
    stage_kinds,
    stage_parameters,
)
from megatron_tropd.rollout.sampling import ELEMENTS_AT_ONCE
from megatron_tropd.rounding import ceil_div

# Megatron's inference context holds seven 64-bit numbers for each token that one step may process.
_BOOKKEEPING = 7 * 8 * MAX_PREFILL_TOKENS


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
        "rollout": ("KV cache", "rollout activations", "sampled logits", "CUDA graphs"),
        "teacher scores": ("batch and scores", "teacher activations", "teacher logits"),
        "update": ("batch and scores", "activations", "logits"),
        "optimizer step": ("batch and scores", "optimizer's temporaries"),
    }

    _OWN_PHASES = {
        "student weights": (),
        "student gradients": ("update", "optimizer step"),
        "optimizer": ("update", "optimizer step"),
        "teacher weights": ("teacher scores",),
        "teacher's output layer": (),
        "attention scratch": (),
        "CUDA context": (),
        "workspaces": (),
        "NCCL": (),
    }

    @property
    def phases(self) -> dict[str, float]:
        """Bytes at the peak of each phase of a step."""
        found = {}
        for phase, names in self._PHASES.items():
            lasting = [n for n, own in self._OWN_PHASES.items() if n not in self.offloaded or phase in own]
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
    """Return the memory of the fullest pipeline stage; where each model has dedicated GPUs, of both."""
    stages = {role: getattr(job.recipe, role).pipeline_model_parallel_size for role in ("student", "teacher")}
    if job.apart:
        kinds = [[(f"the {role}'s pipeline stage {i}", {role: i}) for i in range(n)] for role, n in stages.items()]
    else:
        # Stages of both models are assigned to the same ranks in blocks: rank block i of `count`.
        count = max(stages.values())
        places = [{role: i * n // count for role, n in stages.items()} for i in range(count)]
        kinds = [[(f"pipeline stage {place['student']}", place) for place in places]]
    return [max((stage_memory(job, *place) for place in places), key=lambda found: found.peak) for places in kinds]


def stage_memory(job: Job, gpu: str, stages: dict[str, int]) -> Memory:
    """Return the memory of a GPU, called `gpu`, that holds these stages of the models, by role."""
    found = Memory(gpu, _offloaded(job.recipe))
    if "student" in stages:
        found.parts |= _student_parts(job, stages["student"])
    if "teacher" in stages:
        found.parts |= _teacher_parts(job, stages["teacher"])
    found.parts |= runtime_parts(job, tuple(stages))
    if "student" in stages and job.recipe.rollout.kv_cache_gb == "auto":
        layers = stage_kinds(job.student, job.recipe.student)[stages["student"]].total()
        free = job.gpu.room_gb * 1e9 - found.phases["rollout"]
        found.parts["KV cache"] = max(_cache(job, layers, 1), min(free, _cache(job, layers)))
    return found


def _student_parts(job: Job, stage: int) -> dict[str, float]:
    training, model, hf = job.recipe.training, job.recipe.student, job.student
    size = BYTES[model.dtype]
    parameters = stage_parameters(hf, model)[stage]
    kinds = stage_kinds(hf, model)[stage]
    states: float = 8 if size == 4 else 12  # Adam's moments, and fp32 main weights where the model has none
    states = states if training.optimizer == "adam" else states - 8
    shards, expert_shards = 1, 1
    if training.use_distributed_optimizer:
        shards = job.replicas("student") * model.context_parallel_size
        expert_shards = job.gpus_of("student") // expert_ranks(model)
    tokens = job.micro_batch_tokens / model.context_parallel_size
    a_stage = sum(
        count * layer_activations(hf, model, job.sequence, job.fused, sparse) for sparse, count in kinds.items()
    )
    in_flight = _in_flight(model, stage, max(1, job.rows * job.sequence // job.micro_batch_tokens))
    states *= parameters.shared / shards + parameters.experts / expert_shards
    parts = {
        "student weights": parameters.total * (size + (2 if model.fp8 else 0)),  # 8-bit copies, as is and transposed
        "student gradients": parameters.total * 4,
        "optimizer": states,
        "batch and scores": job.rows * job.sequence * _token_bytes(job),
        **_rollout_parts(job, kinds.total(), stage),
        "activations": tokens * (a_stage * in_flight + _once(job, kinds[True] > 0)),
        "logits": _student_logits(job, tokens, stage),
    }
    if job.method.divergence and stage == model.pipeline_model_parallel_size - 1:
        # Where both layouts are the same it may be the teacher's own weight.
        parts["teacher's output layer"] = (
            _vocabulary(hf, model) * job.teacher.hidden_size * BYTES[job.recipe.teacher.dtype]
        )
    if not job.fused:
        # A number for each parameter that this rank updates; gloo reduces and scatters a copy of all gradients.
        numbers = parameters.total * 4 if shards > 1 else states / (2 if size == 4 else 3)
        parts["optimizer's temporaries"] = numbers
        parts["attention scratch"] = (
            tokens * hf.num_attention_heads / model.tensor_model_parallel_size * job.sequence * size
        )
    return parts


def _rollout_parts(job: Job, layers: int, stage: int) -> dict[str, float]:
    """Return what generation holds: the cache, a prefill of all that begins at once, the logits being drawn from."""
    model, hf = job.recipe.student, job.student
    guided = job.method.guided and job.recipe.guidance.schedule != "none"
    start = job.sequence if guided else job.prompt_tokens  # a prefix may be a whole response
    prefilled = min(job.requests * start, max(MAX_PREFILL_TOKENS, job.sequence))
    sampled = 0.0
    if stage == model.pipeline_model_parallel_size - 1:
        numbers = job.requests * hf.vocab_size
        sampled = 2 * numbers * BYTES[model.dtype] + min(numbers, ELEMENTS_AT_ONCE) * 24
    return {
        "KV cache": _kv_cache(job, layers),
        "rollout activations": prefilled * forward_activations(hf, model, start, job.fused) + _BOOKKEEPING,
        "sampled logits": sampled,
    }


def _teacher_parts(job: Job, stage: int) -> dict[str, float]:
    model, hf = job.recipe.teacher, job.teacher
    tokens = job.micro_batch_tokens / model.context_parallel_size
    fp8_copy = 1 if model.fp8 and not model.offload else 0
    parts = {
        "teacher weights": stage_parameters(hf, model)[stage].total * (BYTES[model.dtype] + fp8_copy),
        "teacher activations": tokens * forward_activations(hf, model, job.sequence, job.fused),
        "teacher logits": _logits(hf, model, tokens, stage),
    }
    if job.apart:
        rows = ceil_div(job.rows * job.replicas("student"), job.replicas("teacher"))
        parts["batch and scores"] = rows * job.sequence * _token_bytes(job)
    return parts


def _token_bytes(job: Job) -> int:
    """Return the bytes of a batch's token with its scores."""
    hidden = job.teacher.hidden_size * BYTES[job.recipe.teacher.dtype] if job.method.divergence else 0
    return 41 + hidden + 12 * (0 if hidden else job.recipe.objective.topk or job.method.topk)


def _offloaded(recipe: Recipe) -> tuple[str, ...]:
    optimizer = ("student gradients", "optimizer") if recipe.training.offload_optimizer else ()
    return (*optimizer, *(("teacher weights",) if recipe.teacher.offload else ()))


def _once(job: Job, sparse: bool) -> float:
    """Return the bytes per token of what is held once: a recomputed layer, and gradients within a layer."""
    hf, model = job.student, job.recipe.student
    tp, size = model.tensor_model_parallel_size, BYTES[model.dtype]
    whole = replace(model, recompute=None)
    again = layer_activations(hf, whole, job.sequence, job.fused, sparse) if model.recompute else 0.0
    ffn = mlp_width(hf, sparse) / tp * size
    if job.fused:
        return again + 3 * ffn
    # Gradients of probabilities and scores, when what the MLP kept is freed already.
    attention = 2 * hf.num_attention_heads / tp * job.sequence * 4 - 5 * ffn
    return again + max(3 * ffn, attention)


def _logits(hf: Any, model: ModelConfig, tokens: float, stage: int) -> float:
    if stage < model.pipeline_model_parallel_size - 1:
        return 0.0
    return tokens * _vocabulary(hf, model) * BYTES[model.dtype]  # their gradient overwrites them


def _student_logits(job: Job, tokens: float, stage: int) -> float:
    whole = _logits(job.student, job.recipe.student, tokens, stage)
    if not job.method.divergence:
        return whole
    return min(whole, LOGITS_ELEMENTS["cuda"] * BYTES[job.recipe.student.dtype]) * 2  # a chunk of both models'


def _vocabulary(hf: Any, model: ModelConfig) -> int:
    """Return the columns of a vocabulary shard."""
    tp = model.tensor_model_parallel_size
    return padded_vocab_size(hf.vocab_size, tp) // tp


def _kv_cache(job: Job, layers: int) -> float:
    """Return the bytes of the cache; of one that takes what is free, none yet: it depends on all other parts."""
    asked = job.recipe.rollout.kv_cache_gb
    if isinstance(asked, str):  # auto
        return 0.0
    return asked * 2**30 if asked else _cache(job, layers)


def _cache(job: Job, layers: int, sequences: int | None = None) -> int:
    """Return the bytes that whole sequences take in `layers` layers: so many, or all that the engine has room for."""
    model = job.recipe.student
    block = CUDA_BLOCK_TOKENS if job.fused else CPU_BLOCK_TOKENS
    sequences = sequences or rounded_requests(job.requests, model.tensor_model_parallel_size)
    return cache_bytes(sequences, job.sequence, block, layer_cache_bytes(job.student, model) * layers)


def sequences_at_once(job: Job) -> int:
    """Return how many whole sequences the student's cache holds, of those that a replica writes at the same time.

    Where the cache is the smaller, the engine lets the others wait.
    """
    if job.recipe.rollout.kv_cache_gb is None:
        return job.requests
    fewest = job.requests
    for stage, kinds in enumerate(stage_kinds(job.student, job.recipe.student)):
        layers = kinds.total()
        held = stage_memory(job, "", _place(job, stage)).parts["KV cache"]
        one, two = _cache(job, layers, 1), _cache(job, layers, 2)
        fewest = min(fewest, 1 + int((held - one) // (two - one)))
    return max(1, fewest)


def _place(job: Job, stage: int) -> dict[str, int]:
    """Return the stages, by role, of a GPU that holds a stage of the student."""
    if job.apart:
        return {"student": stage}
    own, other = (getattr(job.recipe, role).pipeline_model_parallel_size for role in ("student", "teacher"))
    return {"student": stage, "teacher": stage * other // own}
