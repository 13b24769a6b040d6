"""One recipe over every parallel layout of student and teacher: losses, gates, metrics and weights of one process."""

import json

import pytest
from layouts import EXPERT_LAYOUTS, LAYOUTS, OPTIONS, PP, WHOLE_LAYOUTS, in_tiers
from support.helpers import run_distributed
from support.tiny_models import write_model
from support.train_runs import TIMES, records, train_rank, weights_of

TOLERANCE = 1e-5
HELD_OUT = 5  # no multiple of replicas or micro-batches: some get rows that only fill up


def write_material(folder, student, teacher):
    """Write a student, a teacher of another family, width, depth and padding, and prompts with its responses."""
    # A mean over a few trusted tokens keeps its digits where log-probs are of the order of one.
    sizes = {"num_key_value_heads": 4, "initializer_range": 0.12}
    write_model(folder / "student", student, seed=1, **sizes)
    sizes |= {"hidden_size": 64, "num_hidden_layers": 8}
    write_model(folder / "teacher", teacher, seed=2, embeddings=300, **sizes)
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(12):
            prompt = {"id": f"p{i}", "messages": [{"role": "user", "content": f"add {i} and {3 * i}"}]}
            file.write(json.dumps({**prompt, "teacher_response": f"it is {4 * i} {'!' * i}"}) + "\n")
    lines = (folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "held_out.jsonl").write_text("".join(lines[:HELD_OUT]))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Dense models."""
    return write_material(tmp_path_factory.mktemp("material"), "llama_tied", "qwen3")


@pytest.fixture(scope="module")
def expert_material(tmp_path_factory):
    """Models with experts."""
    return write_material(tmp_path_factory.mktemp("experts"), "qwen3_moe", "mixtral")


def overrides_of(material, run, student, teacher):
    layouts = {"student": student, "teacher": student if teacher is None else teacher}
    has_pipeline = PP in student or PP in layouts["teacher"]
    rows = 1 if has_pipeline else 2  # a pipeline needs several micro-batches
    return [
        *(f"{role}.hf_path={material / role}" for role in layouts),
        *(f"{role}.dtype=float32" for role in layouts),
        *(f"{role}.{key}={str(value).lower()}" for role, sizes in layouts.items() for key, value in sizes.items()),
        *(f"data.prompts={material / 'prompts.jsonl'}", f"logging.dir={run}", "logging.tensorboard=false"),
        *("rollout.max_new_tokens=12", "rollout.samples_per_prompt=2", "objective.topk=8", "guidance.beta=0.1"),
        *("training.steps=3", "training.prompts_per_step=4", f"training.micro_batch_size={rows}", "training.lr=1e-2"),
        # A large eps keeps rounding errors of tiny gradients from being blown up to whole updates.
        *("training.adam_eps=1e-2", "checkpoint.save_interval=0", "logging.samples=8"),
        *(option for name, option in OPTIONS.items() if name in run.name),
        *(["guidance.schedule=none"] if "jsd" in run.name else []),
        *("evaluation.interval=3", f"evaluation.held_out={material / 'held_out.jsonl'}"),
    ]


def outcome(processes, material, run, student, teacher):
    """Train; return records, evaluations, the gate of every logged token by (step, sample id), and the weights."""
    summary = run_distributed(train_rank, processes, overrides_of(material, run, student, teacher))[0]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    gates = {(s["step"], s["sample_id"]): [t["kind"] for t in s["tokens"]] for s in samples}
    return records(run), summary["evaluations"], gates, weights_of(run / "checkpoints" / "step_000003" / "model")


@pytest.fixture(scope="module")
def single(material, tmp_path_factory):
    """What one process trains, against which every layout is held."""
    return outcome(1, material, tmp_path_factory.mktemp("single"), {}, None)


@pytest.fixture(scope="module")
def whole_single(material, tmp_path_factory):
    """The same with the objective over the whole vocabulary."""
    return outcome(1, material, tmp_path_factory.mktemp("jsd"), {}, None)


@pytest.fixture(scope="module")
def expert_single(expert_material, tmp_path_factory):
    """The same of the models with experts."""
    return outcome(1, expert_material, tmp_path_factory.mktemp("single"), {}, None)


@pytest.fixture(scope="module")
def table():
    """Rows of differences, printed when all layouts are done (shown with pytest -s)."""
    rows = []
    yield rows
    print("\n| layout | processes | largest relative difference of metrics | of weights | tokens with another gate |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


def largest_difference(ours, theirs):
    """Return the largest difference of any number of two lists of records, relative to max(1, |theirs|)."""
    worst = 0.0
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for key in mine.keys() - set(TIMES):
            pairs = zip(*(x if isinstance(x, list) else [x] for x in (mine[key], other[key])), strict=True)
            worst = max(worst, *(abs(a - b) / max(1.0, abs(b)) for a, b in pairs))
    return worst


@pytest.mark.parametrize("name", in_tiers(LAYOUTS))
def test_every_layout_trains_what_one_process_trains(name, material, single, table, tmp_path):
    compare(name, LAYOUTS[name], material, single, table, tmp_path / name)


@pytest.mark.parametrize("name", in_tiers(WHOLE_LAYOUTS))
def test_every_layout_trains_the_same_divergence(name, material, whole_single, table, tmp_path):
    compare(name, WHOLE_LAYOUTS[name], material, whole_single, table, tmp_path / name)


@pytest.mark.parametrize("name", in_tiers(EXPERT_LAYOUTS))
def test_every_layout_of_experts_trains_what_one_process_trains(name, expert_material, expert_single, table, tmp_path):
    compare(name, EXPERT_LAYOUTS[name], expert_material, expert_single, table, tmp_path / name)


def compare(name, layout, material, single, table, run):
    """Train under a layout and hold everything against `single`."""
    processes, student, teacher = layout
    metrics_records, evaluations, gates, weights = outcome(processes, material, run, student, teacher)
    metrics = max(largest_difference(metrics_records, single[0]), largest_difference(evaluations, single[1]))
    assert gates.keys() <= single[2].keys()  # all samples of the reporting replica are logged, of one process's all
    other_gates = sum(a != b for key in gates for a, b in zip(gates[key], single[2][key], strict=True))
    assert weights.keys() == single[3].keys()
    weight = max(
        ((weights[key] - tensor).abs().max() / tensor.abs().max().clamp(min=1.0)).item()
        for key, tensor in single[3].items()
    )
    table.append(f"| {name} | {processes} | {metrics:.1e} | {weight:.1e} | {other_gates} |")
    assert gates
    assert other_gates == 0
    assert metrics < TOLERANCE
    assert weight < TOLERANCE
