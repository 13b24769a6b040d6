"""A plan's memory beside tensors, of GPU and host, compared with sums by hand."""

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from megatron_tropd.planning.accelerator import Accelerator
from megatron_tropd.planning.host import host_memory
from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import memory, sequences_at_once
from megatron_tropd.planning.runtime import nccl_connections, runtime_parts
from megatron_tropd.planning.seconds import rollout_seconds
from megatron_tropd.planning.sizes import stage_parameters
from megatron_tropd.recipe import load_recipe

SLIM = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
BOTH = ("student", "teacher")


def job_of(*overrides, gpus=8, **others) -> Job:
    """Llama-3.1-70B teaches Llama-3.1-8B."""
    student, teacher = (LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes) for sizes in (SLIM, WIDE))
    return Job(student, teacher, load_recipe("llama_70b_to_8b", list(overrides)), gpus, **others)


def test_each_process_group_has_nccl_buffers():
    # TP=8 on 8 GPUs: all ranks, tensor parallel, model parallel; the teacher's are the same.
    assert nccl_connections(job_of(), BOTH) == (3, 0)
    # The same on 16: data parallel, too.
    assert nccl_connections(job_of(gpus=16), BOTH) == (4, 0)
    # A teacher of TP=4 and PP=2: separate tensor, pipeline and model parallel groups.
    teacher = ("teacher.tensor_model_parallel_size=4", "teacher.pipeline_model_parallel_size=2")
    assert nccl_connections(job_of(*teacher), BOTH) == (6, 0)
    # A teacher of TP=4 is two replicas, each of which sends scores to the one student: one peer besides itself.
    assert nccl_connections(job_of(teacher[0]), BOTH) == (6, 1)
    assert nccl_connections(replace(job_of("student.tensor_model_parallel_size=1"), gpus=1), ("student",)) == (0, 0)


def test_the_parts_beside_tensors_are_the_accelerators():
    gpu = Accelerator(context_gb=2.0, workspaces_gb=0.5, communicator_gb=0.25, graph_gb=0.125)
    parts = runtime_parts(job_of(gpu=gpu), BOTH)
    # 64 requests at a time are one batch size, padded as it is to multiples of 64.
    assert parts == {"CUDA context": 2e9, "workspaces": 0.5e9, "NCCL": 0.75e9, "CUDA graphs": 0.125e9}
    assert runtime_parts(job_of("rollout.cuda_graphs=off", gpu=gpu), BOTH)["CUDA graphs"] == 0
    assert runtime_parts(job_of("rollout.engine=static", gpu=gpu), BOTH)["CUDA graphs"] == 0
    assert runtime_parts(job_of(gpu=gpu, fused=False), BOTH) == {}
    whole = memory(job_of(gpu=gpu))
    smaller = memory(job_of(gpu=replace(gpu, context_gb=1.0)))
    assert {phase: whole.phases[phase] - smaller.phases[phase] for phase in whole.phases} == pytest.approx(
        dict.fromkeys(whole.phases, 1e9)
    )


def test_a_cache_that_takes_what_is_free_fills_the_gpu_and_no_more_than_all_sequences_need():
    job = job_of("rollout.max_batch_size=512")
    whole = memory(job_of("rollout.max_batch_size=512", "rollout.kv_cache_gb=null")).parts["KV cache"]
    roomy, tight = memory(job), memory(replace(job, gpu=Accelerator(memory_gb=70)))
    assert roomy.phases["rollout"] == pytest.approx(79e9)
    assert tight.phases["rollout"] == pytest.approx(69e9)
    assert roomy.parts["KV cache"] < whole
    large = replace(job, gpu=Accelerator(memory_gb=500))
    assert memory(large).parts["KV cache"] == whole
    assert sequences_at_once(large) == 512
    a_sequence = 34 * 256 * 2 * 128 * 32 * 2  # blocks of 256 tokens, one head's keys and values in 32 layers
    assert sequences_at_once(job) == int((roomy.parts["KV cache"] - 2 * 256 * 2 * 128 * 32 * 2) / a_sequence)
    # Fewer responses at once make more waves of decode steps.
    assert rollout_seconds(replace(job, gpu=Accelerator(memory_gb=40))) > 1.5 * rollout_seconds(job)


def test_the_hosts_memory_is_that_of_offloading_and_of_saving():
    shard = stage_parameters(job_of().student, job_of().recipe.student)[0].total
    # TP=8 and no data parallelism: every rank gathers its own three fp32 tensors, and copies one of them twice.
    assert host_memory(job_of()) == pytest.approx({"offloaded": 0.0, "checkpoint": 8 * shard * 20})
    # Two nodes are two replicas: the first ranks are all on the first node.
    assert host_memory(job_of(gpus=16))["checkpoint"] == pytest.approx(8 * shard * 20)
    # TP=1: one of eight ranks gathers the whole model, the others hold their eighth of the state.
    alone = ("student.tensor_model_parallel_size=1", "student.sequence_parallel=false")
    whole = stage_parameters(job_of(*alone).student, job_of(*alone).recipe.student)[0].total
    assert host_memory(job_of(*alone))["checkpoint"] == pytest.approx(whole * 20 + 7 * whole / 8 * 12)
    # Two stages of four ranks on one node: two of them gather a stage each.
    staged = (*alone, "student.pipeline_model_parallel_size=2")
    stage = max(s.total for s in stage_parameters(job_of(*staged).student, job_of(*staged).recipe.student))
    assert host_memory(job_of(*staged))["checkpoint"] == pytest.approx(2 * stage * 20 + 6 * stage / 4 * 12)
    offloaded = host_memory(job_of("teacher.offload=true", "training.offload_optimizer=true"))["offloaded"]
    weights = memory(job_of()).parts["teacher weights"]
    assert offloaded == pytest.approx(8 * (1.2 * weights + 12 * shard))
