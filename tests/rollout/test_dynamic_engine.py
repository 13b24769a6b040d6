"""Megatron's dynamic engine as it is driven here: what a rollout leaves behind, and buffers at CUDA's sizes."""

import gc
import sys

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import make_tokenizer, write_model

from megatron_tropd.config import ModelConfig, RolloutConfig
from megatron_tropd.mcore import decode_graphs
from megatron_tropd.mcore import engine_compat as megatron_engine_compat
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.hf_weights import load_hf_weights
from megatron_tropd.parallel.groups import initialize
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt, Sampling

TEXT = "What is the sum of twelve and thirty? Count them one by one, then say it."
PROMPTS = [
    Prompt(str(length), text=TEXT[:length], index=place, tokens=make_tokenizer()(TEXT[:length]).input_ids)
    for place, length in enumerate((20, 60, 7))
]
SAMPLED = Sampling(samples_per_prompt=2, max_new_tokens=16, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    write_model(path, "llama")
    return str(path)


def make_engine(folder, **rollout):
    """A RolloutEngine of one process."""
    model = ModelConfig(hf_path=folder, dtype="float32")
    groups = initialize(model)
    hf_config = load_hf_config(folder)
    chunks = build_model(hf_config, model, groups)
    load_hf_weights(chunks, hf_config, folder, groups)
    return RolloutEngine(chunks, load_tokenizer(folder), groups, RolloutConfig(**rollout), 200)


def live_caches():
    """Bytes of key/value caches that any inference context in the process still holds."""
    dynamic, static = (
        megatron_engine_compat.DynamicInferenceContext,
        megatron_engine_compat.StaticInferenceContext,
    )
    contexts = [o for o in gc.get_objects() if isinstance(o, (dynamic, static))]
    held = [getattr(c, "memory_buffer", None) for c in contexts]
    held += [t for c in contexts for pair in getattr(c, "key_value_memory_dict", {}).values() for t in pair]
    return sum(t.nbytes for t in held if t is not None)


def _generate_often(folder, kind):
    engine = make_engine(folder, engine=kind)
    gc.collect()
    gc.disable()
    try:
        for _ in range(6):
            engine.generate(PROMPTS, [[]] * 3, SAMPLED)
        return live_caches()
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_cache_outlives_its_rollout_even_without_the_collector(folder, kind):
    assert run_distributed(_generate_often, 1, folder, kind) == [0]


def _generate_to_the_brim(folder, rounder):
    from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext

    from megatron_tropd.parallel import cpu_compat

    engine = make_engine(folder, max_batch_size=rounder)
    cpu_compat.apply_inference()
    DynamicInferenceContext.TOKEN_ROUNDER = rounder  # 64 on CUDA
    megatron_engine_compat.MAX_PREFILL_TOKENS = 100
    longest = [Prompt("p", text="", index=i, tokens=list(range(60, 60 + n))) for i, n in enumerate((30, 30, 30, 40))]
    rollouts = engine.generate(longest, [[]] * 4, Sampling(max_new_tokens=90, seed=1))
    return rollouts.tokens


def test_a_full_step_fits_into_buffers_padded_as_on_cuda(folder):
    """130 tokens per step at most, which pad to 192 where tokens are rounded up to 64."""
    plain, padded = (run_distributed(_generate_to_the_brim, 1, folder, rounder)[0] for rounder in (4, 64))
    assert plain == padded


def _generate_all_rows(folder):
    engine = make_engine(folder)
    expected = engine.generate(PROMPTS, [[]] * 3, SAMPLED)
    decode_graphs._EAGER_STEPS = 1 << 30  # everything but the capture itself, which needs CUDA
    import megatron_tropd.rollout.engine

    megatron_tropd.rollout.engine.graph_obstacle = lambda *args: None
    found = engine.generate(PROMPTS, [[]] * 3, SAMPLED)
    return expected.tokens == found.tokens, expected.logprobs == found.logprobs


def test_decode_steps_of_a_fixed_shape_give_the_same_tokens(folder):
    assert run_distributed(_generate_all_rows, 1, folder) == [(True, True)]


def _generate_sharing(folder, is_sharing):
    config_class, free = megatron_engine_compat.InferenceConfig, megatron_engine_compat._free
    hits = []

    def config(**fields):
        return config_class(**{**fields, "enable_prefix_caching": is_sharing})

    def count_and_free(engine):
        hits.append(engine._prefix_cache_hits)
        free(engine)

    megatron_engine_compat.InferenceConfig, megatron_engine_compat._free = config, count_and_free
    engine = make_engine(folder, max_batch_size=8)
    generator = torch.Generator().manual_seed(0)
    prompts = [
        Prompt(str(i), text="", index=i, tokens=torch.randint(60, 130, (n,), generator=generator).tolist())
        for i, n in enumerate((150, 64, 65, 40))  # of blocks of 64 tokens
    ]
    rollouts = engine.generate(prompts, [[]] * 4, Sampling(samples_per_prompt=4, max_new_tokens=12, seed=3))
    return rollouts.tokens, sum(hits)


@pytest.mark.skipif(megatron_engine_compat.InferenceConfig is None, reason="megatron-core 0.16 shares no prefixes")
def test_samples_share_the_blocks_of_their_prompt(folder):
    (alone, no_hits), (shared, hits) = (run_distributed(_generate_sharing, 1, folder, s)[0] for s in (False, True))
    assert alone == shared
    assert no_hits == 0
    assert hits >= 6  # three prompts fill a block; the first of their samples computes it


def test_graphs_are_for_dense_models_without_stages_on_cuda(monkeypatch):
    class Sizes:
        pp_size = 1
        device = torch.device("cuda")
        num_moe_experts = None

    def obstacle(choice="auto", attention="plain"):
        return decode_graphs.graph_obstacle(sizes, sizes, choice, attention)

    sizes = Sizes()
    pytest.importorskip("triton", reason="the package triton is not installed")
    assert obstacle() is None
    assert obstacle("off") == "rollout.cuda_graphs=off"
    monkeypatch.setitem(sys.modules, "triton", None)  # not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "without Triton" in obstacle()
    assert obstacle(attention="flash") is None
    sizes.pp_size = 2
    assert "pipeline stages" in obstacle(attention="flash")
    sizes.pp_size, sizes.num_moe_experts = 1, 8
    assert "experts" in obstacle(attention="flash")
    sizes.device = torch.device("cpu")
    assert "no CUDA device" in obstacle()
