"""Seconds of one step, from arithmetic, bandwidths and latencies of planning/accelerator.py; nothing is measured here.

Not counted: attention's exchange under context parallelism, which computation hides; overlap of gradients with the
backward pass; checkpoints, evaluation and reading of data.

    decode(job).seconds, step_seconds(job)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.models.build import head_dim
from megatron_tropd.parallel.layout import model_ranks
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import memory, sequences_at_once
from megatron_tropd.planning.sizes import (
    BYTES,
    active_parameters,
    expert_ranks,
    layer_cache_bytes,
    stage_parameters,
    whole_parameters,
)


def step_seconds(job: Job) -> dict[str, float]:
    """Estimate the seconds of a step's stages; responses are taken to reach their longest length."""
    seconds = {
        "rollout": rollout_seconds(job),
        "teacher scores": work(job, "teacher").seconds,
        "update": work(job, "student").seconds + gradient_seconds(job),
    }
    copies = copy_seconds(job)
    return seconds | ({"copies to and from the host": copies} if copies else {})


@dataclass(frozen=True)
class Decode:
    """Seconds of one decode step of a replica, by part; a step writes one token of each of `batch` responses."""

    batch: int
    graphed: bool
    reading: float  # of the weights and of the cache half full; of computing, where that takes longer
    launches: float  # of all layers' kernels, one stage after the other
    engine: float  # bookkeeping and sampling
    collectives: float

    @property
    def seconds(self) -> float:
        """The step's seconds.

        Launched one by one, kernels run while the host launches the next: the slower of the two counts. In a graph
        nothing is launched, and what is left of each kernel's start and end is the device's own time.
        """
        layers = self.launches + self.reading if self.graphed else max(self.launches, self.reading)
        return layers + self.engine + self.collectives


def decode(job: Job) -> Decode:
    """Return the parts of a decode step; pipeline stages wait for one another."""
    rollout, model, hf, gpu = job.recipe.rollout, job.recipe.student, job.student, job.gpu
    tp, pp, size = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, BYTES[model.dtype]
    batch, layers = sequences_at_once(job), hf.num_hidden_layers
    whole = whole_parameters(hf)  # a batch meets all experts; a rank reads its own
    weights = size * (whole.shared / tp + whole.experts / expert_ranks(model) * pp)
    length = job.prompt_tokens + rollout.max_new_tokens / 2
    cache = batch * length * layer_cache_bytes(hf, model) * layers
    computing = 2 * active_parameters(hf) / tp * batch / gpu.flops
    # Two all-reduces per layer, of the attention's and the MLP's output; one of the embedding, one for the logits.
    collectives = (2 * layers + 2) * (gpu.latency(tp) + gpu.all_reduce(batch * hf.hidden_size * size, tp))
    # Experts: tokens go to them and come back. Stages: to each next one, and the drawn token back to the first.
    collectives += 2 * _sparse_layers(job, "student") * gpu.latency(model.expert_model_parallel_size)
    collectives += gpu.hop_seconds * (pp if pp > 1 else 0)
    return Decode(
        batch=batch,
        graphed=job.graphed,
        reading=max((weights + cache) / gpu.bandwidth, computing),
        launches=layers * (gpu.layer_seconds_graphed if job.graphed else gpu.layer_seconds_eager),
        engine=gpu.step_seconds,
        collectives=collectives,
    )


def rollout_seconds(job: Job) -> float:
    """Return the seconds to capture graphs and to read prompts and write responses, as many at once as fit."""
    step = decode(job)
    waves = math.ceil(job.rows / step.batch)
    tp = job.recipe.student.tensor_model_parallel_size
    prefill = 2 * active_parameters(job.student) * job.prompt_tokens * job.rows / (tp * job.gpu.flops)
    writing = waves * job.recipe.rollout.max_new_tokens * step.seconds
    return job.captured_sizes * job.gpu.capture_seconds + prefill + writing


@dataclass(frozen=True)
class Work:
    """Seconds that a rank spends on the forward, and perhaps backward, passes of a micro-batch, by part."""

    micro_batches: int
    computing: float
    launches: float
    collectives: float
    bubble: float  # waiting for other pipeline stages, as a share of all micro-batches' time

    @property
    def seconds(self) -> float:
        """Seconds of all micro-batches; kernels run while the host launches the next ones."""
        return self.micro_batches * (max(self.computing, self.launches) + self.collectives) * (1 + self.bubble)


def work(job: Job, role: str) -> Work:
    """Return the cost of the passes over a step's tokens: the teacher's forward pass, or both of the student's."""
    hf, model, gpu = getattr(job, role), getattr(job.recipe, role), job.gpu
    again = int(role == "student" and model.recompute == "full")
    again += int(role == "student" and job.method.selects is not None)  # and one before it, for the entropies
    passes = 3 + again if role == "student" else 1  # a backward pass computes twice what a forward pass does
    trips = 2 + again if role == "student" else 1  # and sends as much
    pp, cp = model.pipeline_model_parallel_size, model.context_parallel_size
    own = job.rows * job.replicas("student") * job.sequence / job.replicas(role)
    micro_batches = max(1, math.ceil(own / job.micro_batch_tokens))
    attention = 2 * hf.num_hidden_layers * hf.num_attention_heads * head_dim(hf) * job.sequence  # causal: half of 4
    flops = own / micro_batches * (2 * active_parameters(hf) + attention)
    vpp = model.virtual_pipeline_model_parallel_size or 1
    return Work(
        micro_batches=micro_batches,
        computing=passes * flops / (model_ranks(model) * gpu.flops),
        launches=passes * hf.num_hidden_layers / pp * gpu.layer_seconds_eager,
        collectives=trips * _sending(job, role, own / micro_batches / cp),
        bubble=(pp - 1) / (micro_batches * vpp),
    )


def _sending(job: Job, role: str, tokens: float) -> float:
    """Return the seconds of collectives in one pass of `tokens` tokens through a pipeline stage."""
    hf, model, gpu = getattr(job, role), getattr(job.recipe, role), job.gpu
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    ep, stream = model.expert_model_parallel_size, tokens * hf.hidden_size * BYTES[model.dtype]
    # Sequence parallelism's reduce-scatter and all-gather together send what the all-reduce sends.
    sending = 2 * hf.num_hidden_layers / pp * (gpu.latency(tp) + gpu.all_reduce(stream, tp, tp > gpu.node_gpus))
    if ep > 1:
        experts = experts_of(hf)
        assert experts is not None  # they are what is shared
        routed = stream / tp * experts.per_token * (ep - 1) / ep
        sending += 2 * _sparse_layers(job, role) / pp * (gpu.latency(ep) + routed / gpu.link_bandwidth)
    if pp > 1:
        chunks = model.virtual_pipeline_model_parallel_size or 1
        sending += chunks * (gpu.hop_seconds + stream / (tp if model.sequence_parallel else 1) / gpu.link_bandwidth)
    return sending


def gradient_seconds(job: Job) -> float:
    """Return the seconds to sum gradients over the data-parallel ranks and to gather what each has updated.

    The distributed optimizer scatters the sum, half of an all-reduce, and gathers parameters, the other half.
    """
    model, gpu, gpus = job.recipe.student, job.gpu, job.gpus_of("student")
    stages = stage_parameters(job.student, model)
    ranks = gpus // model_ranks(model) * model.context_parallel_size
    shared, experts = max(stage.shared for stage in stages), max(stage.experts for stage in stages)
    spans = model.tensor_model_parallel_size * ranks > gpu.node_gpus
    sharded = job.recipe.training.use_distributed_optimizer
    sent = (4 + BYTES[model.dtype]) / 2 if sharded else 4
    return gpu.all_reduce(shared * sent, ranks, spans) + gpu.all_reduce(
        experts * sent, gpus // expert_ranks(model), gpus // model.pipeline_model_parallel_size > gpu.node_gpus
    )


def copy_seconds(job: Job) -> float:
    """Return the seconds of a step's copies between host and GPU of what is offloaded; the copies of ranks overlap."""
    if not (job.recipe.teacher.offload or job.recipe.training.offload_optimizer):
        return 0.0
    parts, gpu = memory(job).parts, job.gpu
    seconds = 0.0
    if job.recipe.teacher.offload:  # its weights never change: they only come
        seconds += parts.get("teacher weights", 0.0) / gpu.pinned_bandwidth
    if job.recipe.training.offload_optimizer:
        seconds += 2 * parts.get("optimizer", 0.0) / gpu.pageable_bandwidth
    return seconds


def _sparse_layers(job: Job, role: str) -> int:
    experts = experts_of(getattr(job, role))
    return sum(experts.layers) if experts else 0
