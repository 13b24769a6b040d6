"""A plan's seconds: parts of a decode step against their estimates, and whole steps against published ones.

Published figures, read on 2026-11-26 (all on H100s with 80 GB):
- NeMo-RL, tests/test_suites/llm/distillation-qwen3-32b-to-1.7b-base-1n8g-megatron-tp2pp2cp2-pack.sh: bounds of a
  nightly test, so the truth is below them; vLLM writes with TP=1; responses end when they end.
- Model-Optimizer, examples/pruning/minitron/NVIDIA-Nemotron-Nano-9B-v2/README.md: 600 GPU hours per 1,000 steps of
  768 x 8,192 tokens. Its models are Mamba hybrids: dense models with as many parameters replace them.
- NeMo-RL, docs/about/performance-summary.md: GRPO of Qwen3-30B-A3B, 192 s per step on 32 GPUs; the policy scores its
  own responses, as the teacher here; mean length 3,203 of at most 4,096 tokens.
"""

from dataclasses import dataclass

import pytest
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from megatron_tropd.planning.job import Job
from megatron_tropd.planning.memory import memory
from megatron_tropd.planning.proposals import proposals
from megatron_tropd.planning.seconds import decode, gradient_seconds, rollout_seconds, step_seconds, work
from megatron_tropd.planning.text import describe
from megatron_tropd.recipe import load_recipe

FACTOR = 2.0  # within which an estimate must be of what was published


def dense(hidden, ffn, layers, heads, vocabulary=151936, tied=False):
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128}
    return Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=tied, **sizes)


QWEN3_32B = dense(5120, 25600, 64, 64)
QWEN3_1_7B = dense(2048, 6144, 28, 16, tied=True)
NINE_B = dense(4480, 16384, 28, 40, vocabulary=131072)  # 8.88e9 parameters
SEVEN_B = dense(4352, 14592, 24, 40, vocabulary=131072)  # 7.00e9
QWEN3_30B_A3B = Qwen3MoeConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)


def both(*keys):
    return [f"{role}.{key}" for role in ("student", "teacher") for key in keys]


def rollouts(prompts, samples, tokens):
    sizes = [f"training.prompts_per_step={prompts}", f"rollout.samples_per_prompt={samples}"]
    return [*sizes, f"rollout.max_new_tokens={tokens}"]


def on_policy(*layout):
    """Qwen3-32B to 1.7B on 8 GPUs: 32 prompts, 8,192 tokens with prompts of 512."""
    keys = [*rollouts(32, 1, 7680), "training.max_tokens_per_micro_batch=8192", "student.recompute=full"]
    return Job(QWEN3_1_7B, QWEN3_32B, load_recipe(None, [*keys, "objective.name=rkl_full", *layout]), gpus=8)


THEIRS = [f"student.{axis}_parallel_size=2" for axis in ("tensor_model", "pipeline_model", "context")]
THEIRS += ["teacher.tensor_model_parallel_size=4", "teacher.pipeline_model_parallel_size=2"]


@dataclass(frozen=True)
class Published:
    name: str
    figure: float
    estimate: float
    unit: str


def published() -> list[Published]:
    offline_keys = [*rollouts(768, 1, 7680), "training.micro_batch_size=4"]
    offline_keys += both("tensor_model_parallel_size=8", "sequence_parallel=true")
    offline = Job(SEVEN_B, NINE_B, load_recipe(None, offline_keys), gpus=768)
    passes = step_seconds(offline)
    del passes["rollout"]
    experts = [*both("expert_model_parallel_size=8", "expert_tensor_parallel_size=1"), "student.recompute=full"]
    recipe = load_recipe(None, [*rollouts(64, 32, 3896), *experts])
    grpo = Job(QWEN3_30B_A3B, QWEN3_30B_A3B, recipe, gpus=32, prompt_tokens=200)
    ((_, _, fastest), *_) = proposals(on_policy())
    return [
        Published("Qwen3-32B to 1.7B, 8 GPUs, fastest proposal", 50, fastest, "s"),
        Published("its memory", 75, memory(on_policy(*THEIRS)).peak / 1e9, "GB at most"),
        Published("9B to 7B offline, 768 GPUs, TP=8", 2913, 8192 / sum(passes.values()), "tokens/s/GPU"),
        Published("GRPO of Qwen3-30B-A3B, 32 GPUs, EP=8", 192, sum(step_seconds(grpo).values()), "s"),
    ]


def test_estimates_are_within_a_factor_of_two_of_published_steps():
    for step in published():
        print(f"{step.name:<40} published {step.figure:>6.0f}  estimated {step.estimate:>7.1f} {step.unit}")
        least = 0 if "most" in step.unit else step.figure / FACTOR
        most = step.figure if "most" in step.unit else step.figure * FACTOR
        assert least < step.estimate < most, step


def test_a_small_student_is_not_fastest_over_all_gpus_of_a_node():
    for graphs in ("auto", "off"):
        found = proposals(on_policy(f"rollout.cuda_graphs={graphs}"), count=3)
        assert found
        assert all(job.recipe.student.tensor_model_parallel_size < 8 for job, *_ in found), graphs


def deep(layers, *overrides, tp=8):
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    hf = LlamaConfig(vocab_size=128256, num_hidden_layers=layers, **sizes)
    keys = [*both(f"tensor_model_parallel_size={tp}"), "rollout.max_batch_size=8", *overrides]
    return Job(hf, hf, load_recipe(None, keys), gpus=8)


def test_decode_steps_take_what_launches_take():
    assert 15e-3 < decode(deep(32, "rollout.cuda_graphs=off")).seconds < 25e-3
    assert 40e-3 < decode(deep(80, "rollout.cuda_graphs=off")).seconds < 60e-3
    step = decode(deep(32))
    assert 4e-3 < step.seconds < 8e-3
    assert step.seconds == pytest.approx(step.reading + step.launches + step.engine + step.collectives)
    assert not decode(deep(32, "rollout.engine=static")).graphed
    eager = decode(deep(32, "rollout.cuda_graphs=off"))
    assert eager.seconds == pytest.approx(max(eager.launches, eager.reading) + eager.engine + eager.collectives)


def test_collectives_grow_with_tensor_parallelism_and_stages_cost_hops():
    times = [decode(deep(32, tp=tp)).collectives for tp in (1, 2, 4, 8)]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[3] == pytest.approx(66 * (20e-6 + 8 * 4096 * 2 * 7 / 4 / 360e9))  # two per layer, and two more
    staged = deep(32, *both("pipeline_model_parallel_size=2"), tp=1)
    assert decode(staged).collectives == pytest.approx(2 * staged.gpu.hop_seconds)


def test_graphs_are_captured_anew_in_every_rollout():
    job, eager = deep(32, "rollout.max_batch_size=256"), deep(32, "rollout.cuda_graphs=off")
    assert job.captured_sizes == 4  # 64, 128, 192, 256
    assert eager.captured_sizes == 0
    for key in ("pipeline_model_parallel_size=2", "expert_model_parallel_size=1"):
        assert deep(32, f"student.{key}").graphed == key.startswith("expert")  # stages decode eagerly
    writing = job.recipe.rollout.max_new_tokens * 2 * decode(job).seconds  # 512 responses in two waves
    assert rollout_seconds(job) - writing > 4 * job.gpu.capture_seconds


def test_passes_count_collectives_and_what_the_host_can_launch():
    narrow, wide = (work(deep(32, tp=tp), "student") for tp in (1, 8))
    assert narrow.collectives == 0
    tokens = 512 + 8096
    ring = tokens * 4096 * 2 * 7 / 4 / 360e9
    assert wide.collectives == pytest.approx(2 * 2 * 32 * (20e-6 + ring))  # forward and backward, two per layer
    assert wide.launches == pytest.approx(3 * 32 * 0.56e-3)
    alone, replicas = gradient_seconds(deep(32, tp=8)), gradient_seconds(deep(32, tp=1))
    assert alone == 0
    assert replicas > 0


def test_a_plan_says_what_a_decode_step_consists_of():
    text, fits = describe(on_policy())
    step = decode(on_policy())
    assert not fits  # the teacher at TP=1
    assert f"a decode step of {step.batch} responses takes {1e3 * step.seconds:.1f} ms: weights and cache" in text
    for part in ("launches (graphs)", "engine", "collectives"):
        assert f"{part} " in text
