"""Recipes: where values come from, what is refused and how the refusal reads."""

import dataclasses

import pytest

import megatron_tropd
from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.recipe import describe, load_recipe, save_recipe, shipped_recipes
from megatron_tropd.validation import validate

PATHS = ["student.hf_path=student", "teacher.hf_path=teacher", "data.prompts=prompts.jsonl"]


def _refused(*overrides, name=None):
    with pytest.raises(UserError) as error:
        validate(load_recipe(name, [*PATHS, *overrides]))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_are_valid_and_overrides_are_typed():
    recipe = load_recipe(None, [*PATHS, "training.lr=1e-3", "rollout.stop=[a,b]", "data.seed=7", "logging.dir=7"])
    validate(recipe)
    assert recipe.training.lr == 1e-3
    assert recipe.rollout.stop == ["a", "b"]
    assert (recipe.data.seed, recipe.logging.dir) == (7, "7")
    assert load_recipe(None, ["evaluation.answer_pattern=A: {(\\d+)}=#"]).evaluation.answer_pattern == "A: {(\\d+)}=#"
    assert load_recipe(None, ["data.prompts=x", "data.prompts=null"]).data.prompts is None


def test_paper_recipe_is_the_papers():
    recipe = load_recipe("tropd_paper", PATHS)
    validate(recipe)
    rollout, training, objective = recipe.rollout, recipe.training, recipe.objective
    assert (training.steps, training.prompts_per_step, rollout.samples_per_prompt) == (200, 128, 4)
    assert (training.lr, training.lr_schedule, training.weight_decay, training.clip_grad) == (
        5e-6,
        "constant",
        0.1,
        1.0,
    )
    assert (rollout.temperature, rollout.top_p, rollout.max_new_tokens) == (1.0, 1.0, 8096)
    assert (objective.name, objective.gate, objective.outlier, objective.topk) == ("tropd", "bernoulli", "fkl", 64)
    assert (recipe.guidance.schedule, recipe.guidance.beta, recipe.evaluation.samples) == ("cosine", 0.001, 32)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_saved_ones_read_back_equal(name, tmp_path):
    recipe = load_recipe(name, PATHS)
    validate(recipe)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_field_cases_a18_a_mapping_is_given_in_yaml_as_a_whole_or_by_entry(tmp_path):
    for override in ("={enable_thinking: false}", '={"enable_thinking": false}', ".enable_thinking=false"):
        recipe = load_recipe(None, [*PATHS, f"tokenizer.chat_template_kwargs{override}"])
        assert recipe.tokenizer.chat_template_kwargs == {"enable_thinking": False}, override
    (tmp_path / "base.yaml").write_text("tokenizer:\n  chat_template_kwargs:\n    a: 1\n    b: {c: [x, 2.5]}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\ntokenizer: {date: 2020-02-29}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["tokenizer.chat_template_kwargs.a=text"])
    assert recipe.tokenizer.chat_template_kwargs == {"a": "text", "b": {"c": ["x", 2.5]}}
    assert recipe.tokenizer.date == "2020-02-29"
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    whole = load_recipe(tmp_path / "mine.yaml", ["tokenizer.chat_template_kwargs={d: null}"])
    assert whole.tokenizer.chat_template_kwargs == {"d": None}  # replaced, not merged
    assert load_recipe(None, [*PATHS, "tokenizer.chat_template_kwargs={}"]).tokenizer.chat_template_kwargs == {}


def test_field_cases_a18_what_is_no_mapping_is_refused():
    for value in ("5", "[a]", "text", "null", "{1: 2}"):
        assert "expected mapping (variables of the chat template" in _refused(f"tokenizer.chat_template_kwargs={value}")
    assert "unknown key tokenizer.chat_template_kwarg.a" in _refused("tokenizer.chat_template_kwarg.a=1")
    assert "unknown key training.steps.a" in _refused("training.steps.a=1")
    assert "tokenizer.chat_template_kwargs = {}  (mapping)" in describe()


def test_file_and_base(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: other.yaml\ntraining:\n  steps: 3\nrollout:\n")
    (tmp_path / "other.yaml").write_text("base: tropd_paper\ntraining: {steps: 5, lr: 1e-4}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", ["training.seed=9"])
    assert (recipe.training.steps, recipe.training.lr, recipe.training.seed) == (3, 1e-4, 9)
    assert recipe.evaluation.samples == 32
    (tmp_path / "other.yaml").write_text("base: mine.yaml\n")
    with pytest.raises(UserError, match="leads back to this file"):
        load_recipe(tmp_path / "mine.yaml")


def test_unknown_keys_name_the_nearest_and_the_file(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("training:\n  stepz: 3\n")
    with pytest.raises(UserError, match=rf"unknown key training.stepz \({path}\): did you mean training.steps\?"):
        load_recipe(path)
    assert "did you mean training.steps?" in _refused("steps=3")
    assert "did you mean objective.outlier?" in _refused("guidance.outlier=fkl")
    assert "no known key is near it" in _refused("nonsense.qqq=3")
    assert "is a section" in _refused("training=3")
    assert "not of the form section.key=value" in _refused("training.steps")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=1.5", "training.steps=1.5 (override 'training.steps=1.5'): expected int"),
        ("training.lr=fast", "expected float"),
        ("data.shuffle=perhaps", "expected bool"),
        ("training.steps=null", "expected int"),
        ("objective.gate=bernouli", "one of bernoulli, threshold, soft (did you mean bernoulli?)"),
        ("training.steps=0", "expected at least 1"),
        ("training.micro_batch_size=-1", "expected at least 1"),
        ("rollout.top_p=0", "expected more than 0"),
        ("guidance.start=1.5", "expected at most 1"),
        ("training.lr=nan", "expected a finite number"),
        ("rollout.stop=x", "expected list[str]"),
        ("teacher.hf_path=${student.nothing}", "fix the ${section.key}"),
        ("training.lr=[1", "not valid YAML"),
        ("training.max_tokens_per_micro_batch=0", "expected at least 1"),
        ("training.max_tokens_per_micro_batch=-5", "expected at least 1"),
        ("training.max_tokens_per_micro_batch=outo", "one of auto, int, null (did you mean auto?)"),
        ("training.timeout_minutes=0", "expected at least 1"),
    ],
)
def test_wrong_values(override, message):
    assert message in _refused(override)


@pytest.mark.parametrize("section", ["rollout", "evaluation"])
@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ('[""]', "stop string 1, '', is empty"),
        ('[a, "", b]', "stop string 2, '', is empty"),
        ('[" \t"]', r"stop string 1, ' \t', is blank"),
        ("[a, b, a]", "stop string 3, 'a', is listed twice"),
        ("[7]", "stop string 1, 7, is of type int, expected text; write it in quotes"),
        ("[null]", "stop string 1, None, is of type NoneType"),
        ("[true]", "stop string 1, True, is of type bool"),
        ("[[a]]", "stop string 1, ['a'], is of type"),
        ("x", "expected list[str]"),
        ("[a", "not valid YAML"),
    ],
)
def test_field_cases_b10_stop_strings_that_end_everything_or_nothing_are_refused(tmp_path, section, stop, message):
    refused = _refused(f"{section}.stop={stop}")
    assert message in refused
    assert f"{section}.stop" in refused
    if message != "not valid YAML":
        (tmp_path / "recipe.yaml").write_text(f"{section}:\n  stop: {stop}\n")
        with pytest.raises(UserError) as error:
            load_recipe(tmp_path / "recipe.yaml")
        assert message in str(error.value)
        assert "recipe.yaml" in str(error.value)


def test_field_cases_b10_line_breaks_and_special_tokens_are_stop_strings():
    recipe = load_recipe(None, ['rollout.stop=["\\n", "\\n\\n", "<|im_end|>", "7"]', "evaluation.stop=[]"])
    assert recipe.rollout.stop == ["\n", "\n\n", "<|im_end|>", "7"]
    assert (recipe.evaluation.stop, load_recipe(None).evaluation.stop) == ([], None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.hf_path=null"], "student.hf_path or student.checkpoint is missing"),
        (["teacher.hf_path=null"], "teacher.hf_path or teacher.checkpoint is missing"),
        (["data.prompts=null"], "data.prompts is missing"),
        (["evaluation.interval=5"], "evaluation.problems or evaluation.held_out is missing"),
        (["teacher.hf_path=./student"], "teacher and student have the same weights"),
        (["teacher.offload=true", "teacher.ranks=dedicated"], "contradicts teacher.ranks=dedicated"),
        (["student.fp8=hybrid", "student.dtype=float32"], "contradicts student.dtype=float32"),
        (["teacher.replicas=2"], "teacher.replicas=2 needs teacher.ranks=dedicated"),
        (["student.sequence_parallel=true"], "needs student.tensor_model_parallel_size of at least 2"),
        (
            ["student.virtual_pipeline_model_parallel_size=2"],
            "needs student.pipeline_model_parallel_size of at least 2",
        ),
        (["rollout.temperature=0"], "rollout.temperature=0 (greedy) contradicts objective.importance=tis"),
        (["rollout.temperature=0.7"], "rollout.temperature=0.7 and objective.temperature=1.0 contradict"),
        *(
            (
                [f"objective.name={name}", "objective.importance=off", "rollout.temperature=0.7"],
                f"contradict objective.name={name}, which",
            )
            for name in ("eopd", "topd", "reopold")
        ),
        (
            ["objective.name=topd", "objective.importance=off", "guidance.schedule=none", "rollout.temperature=0"],
            "rollout.temperature=0 (greedy) contradicts objective.name=topd",
        ),
        (["objective.name=opd", "guidance.schedule=linear"], "contradicts objective.name=opd"),
        (["objective.name=opd", "guidance.responses=r.jsonl"], "guidance.responses=r.jsonl has no use"),
        (["training.min_lr=1", "training.lr_schedule=cosine"], "training.min_lr=1.0 is above training.lr"),
        (["training.min_lr=1e-7"], "has no use with training.lr_schedule=constant"),
        (["training.overlap_param_gather=true"], "needs training.use_distributed_optimizer=true"),
        (["training.offload_optimizer=true", "student.dtype=float32"], "contradicts student.dtype=float32"),
        (["training.lr_warmup_steps=300"], "training.lr_warmup_steps=300 is more than training.steps=200"),
    ],
)
def test_contradictions(overrides, message):
    assert message in _refused(*overrides)


def test_what_is_no_contradiction():
    validate(load_recipe(None, [*PATHS, "rollout.temperature=0.7", "objective.importance=off"]))
    validate(load_recipe(None, [*PATHS, "objective.name=sft", "teacher.hf_path=null"]))
    validate(load_recipe(None, [*PATHS, "student.fp8=hybrid", "student.dtype=auto"]))  # bfloat16, where fp8 is
    opd = load_recipe(None, [*PATHS, "objective.name=opd"])
    validate(opd)
    assert opd.guidance.schedule == "none"


def test_unreadable_recipes(tmp_path):
    with pytest.raises(UserError, match=r"recipe 'tinny': .*Did you mean tiny\?"):
        load_recipe("tinny")
    broken = tmp_path / "broken.yaml"
    broken.write_text("training: [")
    with pytest.raises(UserError, match=r"broken.yaml cannot be read as YAML"):
        load_recipe(broken)
    broken.write_text("- 1\n")
    with pytest.raises(UserError, match="expected sections"):
        load_recipe(broken)


def test_every_key_is_described():
    text = describe()
    sections = dict(vars(Recipe()))
    sections["data.columns"] = sections["data"].columns
    sections |= {f"logging.{name}": getattr(sections["logging"], name) for name in ("wandb", "mlflow")}
    for section, config in sections.items():
        for field in dataclasses.fields(config):
            if f"{section}.{field.name}" not in sections:
                assert f"{section}.{field.name} = " in text
                assert field.metadata["help"] in text


def test_a_key_of_words_and_numbers_names_both():
    assert "training.max_tokens_per_micro_batch = auto  (auto | int | null)" in describe()
    assert "student.recompute = null  (selective | full)" in describe()


def test_package_exports():
    assert megatron_tropd.load_recipe is load_recipe
    assert megatron_tropd.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        megatron_tropd.nothing


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("4.5", 4.5), ("3", 3.0), ("null", None)])
def test_a_numeric_key_may_take_a_word(text, value):
    recipe = load_recipe(None, [f"rollout.kv_cache_gb={text}"])
    assert recipe.rollout.kv_cache_gb == value
    assert load_recipe(None, []).rollout.kv_cache_gb == "auto"


@pytest.mark.parametrize(
    ("text", "expected"), [("lots", "one of auto, float, null"), ("0", "more than 0"), ("true", "auto | float | null")]
)
def test_a_numeric_key_takes_no_other_word(text, expected):
    assert f"expected {expected}" in _refused(f"rollout.kv_cache_gb={text}")


def test_a_section_within_a_section(tmp_path):
    recipe = load_recipe(None, ["data.columns.prompt=question", "data.columns.id=7"])
    assert (recipe.data.columns.prompt, recipe.data.columns.id, recipe.data.columns.answer) == ("question", "7", None)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    file = tmp_path / "recipe.yaml"
    file.write_text("data:\n  seed: 3\n  columns:\n    answer: a.b\n")
    assert (load_recipe(file).data.columns.answer, load_recipe(file).data.seed) == ("a.b", 3)
    file.write_text("data:\n  columns:\n")
    assert load_recipe(file) == load_recipe(None)
    file.write_text("data:\n  columns: {promt: x}\n")
    with pytest.raises(
        UserError, match=r"unknown key data.columns.promt .*recipe.yaml.*did you mean data.columns.prompt"
    ):
        load_recipe(file)
    assert "data.columns (override 'data.columns=x') is a section, not a key" in _refused("data.columns=x")
    assert "data.columns.prompt = null  (str | null)" in describe()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a,b.jsonl", "a,b.jsonl"),
        ("7", "7"),
        ("[a.jsonl, b.parquet]", ["a.jsonl", "b.parquet"]),
        ("null", None),
    ],
)
def test_files_are_one_path_or_a_list(text, value, tmp_path):
    recipe = load_recipe(None, [f"data.prompts={text}"])
    assert recipe.data.prompts == value
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml").data.prompts == value


@pytest.mark.parametrize("text", ["[]", "[1]", "[[a]]", "[a, null]"])
def test_files_are_nothing_else(text):
    assert "expected str | list[str] | null (prompts:" in _refused(f"data.prompts={text}")


@pytest.mark.parametrize("value", [".nan", "-.inf", "inf", "1e39"])
@pytest.mark.parametrize(
    "key",
    [
        *("training.lr", "training.weight_decay", "training.clip_grad", "training.adam_eps", "objective.clip"),
        *("objective.temperature", "objective.importance_cap", "rollout.temperature", "guidance.beta"),
        *("rollout.kv_cache_gb", "training.min_lr", "training.loss_spike_factor", "objective.gate_threshold"),
    ],
)
def test_field_cases_b8_a_key_that_is_not_finite_is_refused_as_the_recipe_is_read(key, value, tmp_path):
    section, name = key.split(".")
    (tmp_path / "recipe.yaml").write_text(f"{section}:\n  {name}: {value}\n")
    for arguments in ((tmp_path / "recipe.yaml", []), (None, [f"{key}={value}"])):
        with pytest.raises(UserError, match=rf"^{key}=.*expected ") as error:
            load_recipe(*arguments)
        assert "finite" in str(error.value) or key == "rollout.kv_cache_gb"


@pytest.mark.parametrize("key", ["adam_beta1", "adam_beta2"])
def test_field_cases_b8_an_adam_that_divides_by_zero_is_refused(key):
    assert f"training.{key}=1.0 is not below 1" in _refused(f"training.{key}=1")
