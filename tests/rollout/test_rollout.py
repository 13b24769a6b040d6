"""Rollouts are those of whole forward passes, whatever the layout, batch, order and engine; training goes on after."""

import json

import pytest
import torch
from support.helpers import run_distributed
from support.tiny_models import EOS_ID, VOCAB_SIZE, make_model, make_tokenizer, write_model

from megatron_tropd.config import ModelConfig, RolloutConfig
from megatron_tropd.errors import UserError
from megatron_tropd.mcore.compat import run_schedule
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.hf_weights import load_hf_weights
from megatron_tropd.parallel.groups import initialize
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.tokenizers.tokenizer import load_tokenizer
from megatron_tropd.types import Prompt, Sampling

CONTEXT = 100
SHORTEST = 4 + 24  # of "static small batches": rotary embeddings of this length were made in inference mode
EOS_IDS = {EOS_ID, 50, 90}
TEXT = "What is the sum of twelve and thirty? Count them one by one, then say it."
PROMPTS = [
    Prompt(str(length), text=TEXT[:length], index=place, tokens=make_tokenizer()(TEXT[:length]).input_ids)
    for place, length in enumerate((20, 1, 60, 7, 33, 3))
]
PREFIXES = [[], make_tokenizer()("Well").input_ids[1:], [], [], [70], []]
BLOCK_GB = 64 * 2 * 2 * 8 * 4 * 4 / 2**30  # 64 tokens' keys and values of 2 heads of width 8 in 4 fp32 layers

GREEDY = {"temperature": 0.0, "max_new_tokens": 24}
SAMPLED = {"samples_per_prompt": 2, "max_new_tokens": 24, "temperature": 0.9, "seed": 3, "step": 1}
BASE_CASES = {"greedy": {"sampling": GREEDY}, "sampled": {"sampling": SAMPLED}}
CASES = {
    **BASE_CASES,
    "uninitialised": {"sampling": SAMPLED, "nan_memory": True},
    "small batches": {"sampling": SAMPLED, "max_batch_size": 4},
    "one by one": {"sampling": GREEDY, "max_batch_size": 1},
    "reversed": {"sampling": SAMPLED, "order": [5, 4, 3, 2, 1, 0]},
    "some": {"sampling": SAMPLED, "order": [3, 1]},
    "static": {"sampling": SAMPLED, "engine": "static"},
    "static greedy": {"sampling": GREEDY, "engine": "static"},
    "static small batches": {"sampling": SAMPLED, "engine": "static", "max_batch_size": 5},
    "little cache": {"sampling": SAMPLED, "kv_cache_gb": 4 * BLOCK_GB},
    "other seed": {"sampling": {**SAMPLED, "seed": 4}},
    "other step": {"sampling": {**SAMPLED, "step": 2}},
    "top-k": {"sampling": {**SAMPLED, "top_k": 3}},
    "top-p": {"sampling": {**SAMPLED, "top_p": 0.5}},
    "stop": {"sampling": {**SAMPLED, "stop": ("e", "T2")}},
    "static stop": {"sampling": {**SAMPLED, "stop": ("e", "T2")}, "engine": "static"},
    "short context": {"sampling": {**GREEDY, "max_new_tokens": 90}, "context": 64},
    "whole prefixes": {
        "sampling": {**GREEDY, "max_new_tokens": 3},
        "prefixes": [[60, EOS_ID], [60, 61, 62], [60, 61], [60, 50], [60, 61, 62, 63], []],
    },
    "nothing to do": {"sampling": GREEDY, "prefixes": [[90]] * 6},
}


def _generate(folder, layout, cases):
    """Run the cases with one model in train mode; their rollouts, and whether it can train afterwards."""
    model = ModelConfig(hf_path=folder, dtype="float32", **layout)
    groups = initialize(model)
    hf_config = load_hf_config(folder)
    chunks = build_model(hf_config, model, groups)
    load_hf_weights(chunks, hf_config, folder, groups)
    tokenizer = load_tokenizer(folder)
    results = {}
    for name, case in cases.items():
        fields = {k: case[k] for k in ("engine", "max_batch_size", "kv_cache_gb") if k in case}
        engine = RolloutEngine(chunks, tokenizer, groups, RolloutConfig(**fields), case.get("context", CONTEXT))
        order = case.get("order", range(len(PROMPTS)))
        prefixes = case.get("prefixes", PREFIXES)
        torch.use_deterministic_algorithms(case.get("nan_memory", False), warn_only=True)  # fills torch.empty with NaN
        try:
            results[name] = engine.generate(
                [PROMPTS[i] for i in order], [prefixes[i] for i in order], Sampling(**case["sampling"])
            )
        except UserError as error:
            results[name] = str(error)
        torch.use_deterministic_algorithms(False)
    states = {(m.training, c.config.sequence_parallel) for c in chunks for m in c.modules() if hasattr(m, "training")}
    return results, states, [_gradient_norm(chunks, groups, length) for length in (SHORTEST, CONTEXT)]


def _gradient_norm(chunks, groups, length):
    tokens = torch.arange(length // groups.cp_size)[None] % VOCAB_SIZE
    micro_batches = [tokens] * (groups.pp_size if groups.virtual_pipeline_size else 1)
    for parameter in chunks[0].parameters():
        parameter.grad = None

    def forward_step(data_iterator, chunk):
        rows = next(data_iterator)
        output = chunk(rows, torch.arange(rows.size(1))[None], None)
        return output, lambda logits: (logits.square().sum(), torch.tensor(1), {})

    run_schedule(groups, forward_step, micro_batches, chunks, length, 1, forward_only=False)
    grads = [p.grad for p in chunks[0].parameters()]
    assert all(g is not None and g.isfinite().all() for g in grads)
    return sum(g.square().sum().item() for g in grads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "model"
    write_model(path, "llama")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(EOS_IDS)}))
    return str(path)


@pytest.fixture(scope="module")
def single(folder):
    return run_distributed(_generate, 1, folder, {}, CASES)[0]


@pytest.fixture(scope="module")
def rollouts(single):
    return single[0]


@pytest.fixture(scope="module")
def reference():
    return make_model("llama")


def _logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0]


def _greedy(reference, start, budget):
    """The loop of whole forward passes."""
    tokens = list(start)
    while len(tokens) < len(start) + budget:
        tokens.append(_logits(reference, tokens)[-1].argmax().item())
        if tokens[-1] in EOS_IDS:
            return tokens, "eos"
    return tokens, "length"


def _assert_same(ours, theirs, order=None):
    order = range(len(theirs)) if order is None else order
    for name in ("tokens", "finish_reasons", "sample_ids", "prompt_lengths", "prefix_lengths", "lengths", "texts"):
        assert getattr(ours, name) == [getattr(theirs, name)[i] for i in order], name
    for mine, i in zip(ours.logprobs, order, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs.logprobs[i]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["greedy", "static greedy", "one by one"])
def test_greedy_rollouts_are_those_of_whole_forward_passes(rollouts, reference, case):
    rolled = rollouts[case]
    for i, (prompt, prefix) in enumerate(zip(PROMPTS, PREFIXES, strict=True)):
        start = prompt.tokens + prefix
        budget = GREEDY["max_new_tokens"] - len(prefix)
        assert (rolled.tokens[i], rolled.finish_reasons[i]) == _greedy(reference, start, budget)
    assert len(set(rolled.finish_reasons)) == 2, "prompts should end in both ways"


@pytest.mark.parametrize("case", ["greedy", "sampled", "static", "top-k", "top-p"])
def test_log_probs_are_those_of_whole_forward_passes(rollouts, reference, case):
    rolled, temperature = rollouts[case], CASES[case]["sampling"]["temperature"] or 1.0
    for i, tokens in enumerate(rolled.tokens):
        start = rolled.prompt_lengths[i] + rolled.prefix_lengths[i]
        logprobs = (_logits(reference, tokens) / temperature).log_softmax(-1)
        expected = logprobs[range(start - 1, len(tokens) - 1), tokens[start:]]
        torch.testing.assert_close(torch.tensor(rolled.logprobs[i]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("world_size", "layout"),
    [
        (2, {"tensor_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2}),
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
        (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=["tp2", "pp2", "tp2_pp2_sp", "pp2_interleaved", "pp2_first_stage_of_1", "cp2"],
)
def test_rollouts_do_not_depend_on_the_layout_and_training_goes_on(folder, single, world_size, layout):
    cases = {name: CASES[name] for name in ("greedy", "sampled", "static small batches", "stop")}
    if world_size == 2 and len(layout) == 1 and "context_parallel_size" not in layout:
        cases["little cache"] = {"sampling": SAMPLED, "kv_cache_gb": 4 * BLOCK_GB / 2}
    for results, states, norms in run_distributed(_generate, world_size, folder, layout, cases):
        for name in cases:
            _assert_same(results[name], single[0][name])
        assert states == {(True, layout.get("sequence_parallel", False))}
        assert min(norms) > 0


def test_the_model_trains_on_after_rollouts(single):
    _, states, norms = single
    assert states == {(True, False)}
    assert min(norms) > 0


@pytest.mark.parametrize("case", ["uninitialised", "small batches", "static", "static small batches", "little cache"])
def test_sampled_rollouts_depend_on_neither_batch_nor_engine(rollouts, case):
    _assert_same(rollouts[case], rollouts["sampled"])


def test_sampled_rollouts_do_not_depend_on_the_other_prompts(rollouts):
    _assert_same(rollouts["reversed"], rollouts["sampled"], [10, 11, 8, 9, 6, 7, 4, 5, 2, 3, 0, 1])
    _assert_same(rollouts["some"], rollouts["sampled"], [6, 7, 2, 3])


def test_seed_step_and_sample_number_change_the_rollouts(rollouts):
    sampled = rollouts["sampled"].tokens
    for case in ("other seed", "other step"):
        assert all(a != b for a, b in zip(rollouts[case].tokens, sampled, strict=True))
    assert all(sampled[2 * i] != sampled[2 * i + 1] for i in range(len(PROMPTS)))


def test_rollouts_describe_themselves(rollouts):
    sampled = rollouts["sampled"]
    assert sampled.sample_ids == list(range(12))
    assert [p.index for p in sampled.prompts] == [i // 2 for i in range(12)]
    tokenizer = make_tokenizer()
    for i, tokens in enumerate(sampled.tokens):
        prompt, prefix = PROMPTS[i // 2].tokens, PREFIXES[i // 2]
        assert tokens[: len(prompt) + len(prefix)] == prompt + prefix
        assert (sampled.prompt_lengths[i], sampled.prefix_lengths[i]) == (len(prompt), len(prefix))
        assert sampled.lengths[i] == len(tokens)
        own = tokens[len(prompt) + len(prefix) :]
        assert len(sampled.logprobs[i]) == len(own) <= SAMPLED["max_new_tokens"] - len(prefix)
        assert sampled.texts[i] == tokenizer.decode(own, skip_special_tokens=True)
        assert (own[-1] in EOS_IDS) == (sampled.finish_reasons[i] == "eos")
        assert not EOS_IDS & set(own[:-1])
        assert max(own) < VOCAB_SIZE


@pytest.mark.parametrize(("case", "inside"), [("top-k", 3), ("top-p", None)])
def test_filters_hold_at_every_token(rollouts, reference, case, inside):
    rolled = rollouts[case]
    for i, tokens in enumerate(rolled.tokens):
        start = rolled.prompt_lengths[i] + rolled.prefix_lengths[i]
        probabilities = (_logits(reference, tokens)[start - 1 : -1] / SAMPLED["temperature"]).softmax(-1)
        own = torch.tensor(tokens[start:])
        chosen = probabilities.gather(1, own[:, None])
        above = torch.where(probabilities > chosen + 1e-5, probabilities, 0.0)
        assert ((above > 0).sum(-1) < inside if inside else above.sum(-1) < 0.5 + 1e-4).all()


def test_stop_strings_end_responses_and_are_cut_from_the_text(rollouts):
    stopped, sampled = rollouts["stop"], rollouts["sampled"]
    _assert_same(rollouts["static stop"], stopped)
    assert "stop" in stopped.finish_reasons
    decode = make_tokenizer().decode
    for i, reason in enumerate(stopped.finish_reasons):
        tokens = stopped.tokens[i]
        assert tokens == sampled.tokens[i][: len(tokens)]  # the same draws, ended earlier
        own = decode(tokens[stopped.prompt_lengths[i] + stopped.prefix_lengths[i] :], skip_special_tokens=True)
        assert (own.endswith("e") or own.endswith("T2")) == (reason == "stop")
        assert "e" not in stopped.texts[i]
        assert own.startswith(stopped.texts[i])


def test_the_context_bounds_responses(rollouts, reference):
    rolled = rollouts["short context"]
    for i, tokens in enumerate(rolled.tokens):
        start = PROMPTS[i].tokens + PREFIXES[i]
        assert (tokens, rolled.finish_reasons[i]) == _greedy(reference, start, 64 - len(start))
    assert len(rolled.tokens[2]) == 64


def test_prefixes_that_are_whole_responses_are_left_alone(rollouts):
    rolled = rollouts["whole prefixes"]
    lengths = [len(logprobs) for logprobs in rolled.logprobs]
    assert rolled.finish_reasons[:5] == ["prefix", "length", rolled.finish_reasons[2], "prefix", "length"]
    assert lengths[:2] + lengths[3:5] == [0, 0, 0, 0]
    assert lengths[2] == 1
    assert 1 <= lengths[5] <= 3
    assert rolled.tokens[0] == [*PROMPTS[0].tokens, 60, EOS_ID]
    assert rollouts["nothing to do"].finish_reasons == ["prefix"] * 6
    assert rollouts["nothing to do"].texts == [""] * 6


def test_a_prompt_without_room_for_a_response_is_named(folder):
    engine = RolloutEngine([None], load_tokenizer(folder), None, RolloutConfig(), 61)
    with pytest.raises(UserError, match="prompt '60' has 61 tokens and a prefix of 0, and the context is 61"):
        engine.generate(PROMPTS[2:3], [[]], Sampling())


def test_a_cache_too_small_for_one_response_is_refused(folder):
    cases = {"tiny": {"sampling": GREEDY, "kv_cache_gb": 2 * BLOCK_GB}}
    results, states, _ = run_distributed(_generate, 1, folder, {}, cases)[0]
    assert "cannot hold one response of 85 tokens" in results["tiny"]
    assert states == {(True, False)}


def _generate_spread(folder, layout):
    """Deal the prompts to replicas that share experts, then give them all to the first one; tokens by sample id."""
    groups = initialize(ModelConfig(hf_path=folder, dtype="float32", **layout))
    hf_config = load_hf_config(folder)
    chunks = build_model(hf_config, ModelConfig(hf_path=folder, dtype="float32", **layout), groups)
    load_hf_weights(chunks, hf_config, folder, groups)
    engine = RolloutEngine(chunks, load_tokenizer(folder), groups, RolloutConfig(max_batch_size=4), CONTEXT)
    found = []
    for share in (range(groups.dp_rank, len(PROMPTS), groups.dp_size), range(0 if groups.dp_rank else len(PROMPTS))):
        rollouts = engine.generate([PROMPTS[i] for i in share], [PREFIXES[i] for i in share], Sampling(**SAMPLED))
        found.append(dict(zip(rollouts.sample_ids, rollouts.tokens, strict=True)))
    return found


EXPERT_LAYOUTS = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "tp2_ep4": (
        4,
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
    ),
    "tp2_ep2": (4, {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2_ep2": (4, {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2}),
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "mixture"
    write_model(path, "qwen3_moe")
    return str(path), run_distributed(_generate_spread, 1, str(path), {})[0][0]


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
def test_replicas_that_share_experts_write_what_one_process_writes(name, mixture):
    folder, expected = mixture
    assert len({len(tokens) for tokens in expected.values()}) > 3  # some end long before others
    spread, all_on_one = zip(
        *run_distributed(_generate_spread, EXPERT_LAYOUTS[name][0], folder, EXPERT_LAYOUTS[name][1])
    )
    for shares in (spread, all_on_one):
        found = {sample_id: tokens for share in shares for sample_id, tokens in share.items()}
        assert found == expected
