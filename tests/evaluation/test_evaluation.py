"""Answers are found, compared and counted by hand-written cases; the reduction is checked on two real ranks."""

import json

import pytest
from support.helpers import run_distributed

from megatron_tropd.config import EvaluationConfig, ModelConfig, RolloutConfig
from megatron_tropd.errors import UserError
from megatron_tropd.evaluation.accuracy import describe, evaluate, load_problems, training_record
from megatron_tropd.grading.grader import Grader
from megatron_tropd.types import Prompt, Rollouts


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so \boxed{12} or rather \boxed{13}.", "13"),
        (r"nested \boxed{\frac{1}{2}} end 7", r"\frac{1}{2}"),
        (r"cut short \boxed{5} then \boxed{6", "5"),
        ("3 + 4 = 7\n#### 7\n", "7"),
        ("#### 1\n#### -2,500 ", "-2,500"),
        ("first 3, then 4.", "4"),
        ("10-3", "3"),
        ("it is -3", "-3"),
        ("costs 1,234.50 in all", "1,234.50"),
        ("half is 1/2", "1/2"),
        ("no number here", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(response, answer):
    with Grader() as grader:
        assert grader.find(response) == answer


@pytest.mark.parametrize(
    ("response", "pattern", "answer"),
    [("A: 3 A: 4", r"A: (\d)", "4"), ("x7y8", r"\d", "8"), ("none", r"A: (\d)", None), ("", r"\d", None)],
)
def test_a_pattern_finds_the_answer(response, pattern, answer):
    with Grader(pattern=pattern) as grader:
        assert grader.find(response) == answer
        assert grader.grade(response, answer or "4") == (answer, answer is not None)


class _WordTokenizer:
    def encode_prompt(self, prompt):
        return list(range(len(prompt.text.split())))


def test_problems_without_answers_are_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(p) for p in [{"text": "a", "answer": 3}, {"text": "b"}]))
    with pytest.raises(UserError, match="line 2: answer is missing"):
        load_problems(path, _WordTokenizer())


class _Recorder:
    """An engine that only notes how it is asked to draw."""

    def generate(self, prompts, prefixes, sampling):
        self.sampling = sampling
        return Rollouts([], [], [], [], [], [], [])


def _record_sampling(config, rollout):
    from megatron_tropd.parallel.groups import initialize, shutdown

    groups, engine = initialize(ModelConfig()), _Recorder()
    problem = Prompt(id="0", text="?", answer="1")
    evaluate(engine, [problem], EvaluationConfig(**config), groups, rollout=RolloutConfig(**rollout))
    shutdown()
    return engine.sampling


def test_field_cases_a5_evaluation_takes_the_recipes_stop_and_sampling_and_its_own_first():
    rollout = {"stop": ["\nQ:"], "top_k": 5, "top_p": 0.9, "temperature": 0.7, "max_new_tokens": 99}
    (taken,) = run_distributed(_record_sampling, 1, {"samples": 1}, rollout)
    assert (taken.stop, taken.top_k, taken.top_p, taken.max_new_tokens) == (("\nQ:",), 5, 0.9, 99)
    assert taken.temperature == 0.0  # evaluation is greedy unless it says otherwise itself
    own = {"stop": [], "top_k": 0, "top_p": 1.0, "temperature": 1.0, "max_new_tokens": 7}
    (taken,) = run_distributed(_record_sampling, 1, own, rollout)
    assert (taken.stop, taken.top_k, taken.top_p, taken.temperature, taken.max_new_tokens) == ((), 0, 1.0, 1.0, 7)


class _Parrot:
    """An engine by rule: problem i is answered with i, and with i + 1 on its second sample."""

    def generate(self, prompts, prefixes, sampling):
        n = sampling.samples_per_prompt
        pairs = [(p, j) for p in prompts for j in range(n)]
        return Rollouts(
            tokens=[[1, 2, 3] for _ in pairs],
            prompt_lengths=[1 for _ in pairs],
            prefix_lengths=[0 for _ in pairs],
            lengths=[3 + p.index for p, _ in pairs],
            logprobs=[[0.0, 0.0] for _ in pairs],
            finish_reasons=["eos" if j == 0 else "length" for _, j in pairs],
            sample_ids=[p.index * n + j for p, j in pairs],
            prompts=[p for p, _ in pairs],
            texts=[f"#### {p.index + j}" for p, j in pairs],
        )


def _evaluate(problems, config):
    from megatron_tropd.parallel.groups import initialize, shutdown

    groups = initialize(ModelConfig())
    try:
        return evaluate(_Parrot(), problems, config, groups, rollout=RolloutConfig(max_batch_size=4))
    except UserError as error:
        return str(error)
    finally:
        shutdown()


def _problems(answers, domains=None):
    domains = domains or [None] * len(answers)
    return [
        Prompt(id=f"p{i}", text="?", answer=answer, index=i, domain=domain, row=f"problems.jsonl:{i + 1}")
        for i, (answer, domain) in enumerate(zip(answers, domains, strict=True))
    ]


def test_data_parallel_evaluation_counts_every_problem_once():
    arguments = (_problems(["0", "1", "2", "3", "4"]), EvaluationConfig(samples=2))
    single = run_distributed(_evaluate, 1, *arguments)[0]
    assert (single["correct"], single["total"], single["accuracy"]) == (5, 10, 0.5)
    assert (single["problems"], single["pass_at_k"]) == (5, {"1": 0.5, "2": 1.0})
    assert (single["accuracy_low"], single["accuracy_high"]) == (0.5, 0.5)  # every problem is right once in two
    assert single["mean_response_length"] == 2 + (0 + 1 + 2 + 3 + 4) / 5
    assert single["finish_reasons"] == {"eos": 5, "length": 5}
    assert [s["sample_id"] for s in single["samples"]] == list(range(10))
    assert "domains" not in single
    assert single["grader_exceeded"] == 0
    for result in run_distributed(_evaluate, 2, *arguments):
        assert result == single


def test_domains_are_reported_apart_on_every_rank():
    problems = _problems(["0", "7", "1 + 1", "9"], ["easy", "hard", "easy", "hard"])
    for result in run_distributed(_evaluate, 2, problems, EvaluationConfig()):
        assert result["accuracy"] == 0.5
        assert {name: domain["accuracy"] for name, domain in result["domains"].items()} == {"easy": 1.0, "hard": 0.0}
        assert result["domains"]["hard"]["finish_reasons"] == {"eos": 2}
        assert "easy" in describe(result)
        record = training_record(result)
        assert record["accuracy/easy"] == 1.0
        assert record["accuracy_low"] < 0.5 < record["accuracy_high"]
        assert all(isinstance(value, float) for value in record.values())


def test_field_cases_b1_b2_an_evaluation_survives_every_response():
    problems = _problems(["1" * 5000, "\\boxed{" * 8000, "9^{9^{9^{9}}}", "3"])
    (result,) = run_distributed(_evaluate, 1, problems, EvaluationConfig())
    assert [sample["correct"] for sample in result["samples"]] == [False, False, False, True]


def test_answers_that_cannot_be_met_are_refused_on_every_rank():
    problems = _problems(["B", "2"])
    for result in run_distributed(_evaluate, 2, problems, EvaluationConfig(grader="multiple_choice")):
        assert result.startswith("problems.jsonl:2: answer='2' is no letter")


def test_a_grading_process_that_does_not_start_is_said_on_every_rank():
    for result in run_distributed(_evaluate_without_python, 2):
        assert "the process that grades answers did not start" in result


def _evaluate_without_python():
    import sys

    sys.executable = "/bin/false"
    return _evaluate(_problems(["x", "x+1"]), EvaluationConfig(answer_pattern="#### (.)"))


def test_one_problem_has_no_interval():
    (result,) = run_distributed(_evaluate, 1, _problems(["0"]), EvaluationConfig(samples=4))
    assert (result["accuracy"], result["accuracy_low"], result["accuracy_high"]) == (0.25, None, None)
    assert result["pass_at_k"] == {"1": 0.25, "2": 0.5, "4": 1.0}
    assert sorted(training_record(result)) == ["accuracy", "evaluation_response_length", "pass_at_2", "pass_at_4"]
    assert "interval" not in describe(result)
    assert "pass@4 1.0000" in describe(result)
    json.dumps(result, allow_nan=False)
