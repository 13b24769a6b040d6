"""One recipe over every parallel layout of student and teacher: losses, gates, metrics and weights of one process."""

import json

import pytest
from helpers import run_distributed
from test_train import TIMES, records, train_rank, weights_of
from tiny_models import write_model

TOLERANCE = 1e-5
TP, PP, VPP = (f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "virtual_pipeline"))
SP, CP = "sequence_parallel", "context_parallel_size"
EP, ETP = "expert_model_parallel_size", "expert_tensor_parallel_size"

APART = {"ranks": "dedicated"}

# Settings of training by what a layout's name contains.
OPTIONS = {
    "overlap": "training.overlap_grad_reduce=true",
    "gather": "training.overlap_param_gather=true",
    "packed": "training.max_tokens_per_micro_batch=96",
    "jsd": "objective.name=jsd",
}

# name -> (processes, student's layout, teacher's layout or None for the same)
LAYOUTS = {
    "tp2": (2, {TP: 2}, None),
    "tp2_sp": (2, {TP: 2, SP: True}, None),
    "pp2": (2, {PP: 2}, None),
    "tp2_pp2_sp": (4, {TP: 2, PP: 2, SP: True}, None),
    "pp2_first_stage_of_1": (2, {PP: 2, "num_layers_in_first_pipeline_stage": 1}, None),
    "pp3_counting_embedding_and_loss": (
        3,
        {PP: 3, "account_for_embedding_in_pipeline_split": True, "account_for_loss_in_pipeline_split": True},
        {PP: 3, "num_layers_in_last_pipeline_stage": 2},
    ),
    "pp2_interleaved": (2, {PP: 2, VPP: 2}, None),
    "tp2_pp2_sp_interleaved": (4, {TP: 2, PP: 2, SP: True, VPP: 2}, None),
    "cp2": (2, {CP: 2}, None),
    "cp4": (4, {CP: 4}, None),
    "tp2_cp2_sp": (4, {TP: 2, CP: 2, SP: True}, None),
    "pp2_cp2": (4, {PP: 2, CP: 2}, None),
    "cp2_dp2": (4, {CP: 2}, None),
    "tp2_recompute_selective": (2, {TP: 2, "recompute": "selective"}, None),
    "dp2_teacher_tp2_offloaded": (2, {}, {TP: 2, "offload": True}),
    "dp2_overlap_gather": (2, {}, None),
    "pp2_dp2_overlap_gather": (4, {PP: 2}, None),
    "pp2_dp2_interleaved_overlap": (4, {PP: 2, VPP: 2}, None),
    "dp2": (2, {}, None),
    "tp2_dp2": (4, {TP: 2}, None),
    "packed": (1, {}, None),
    "tp2_sp_packed": (2, {TP: 2, SP: True}, None),
    "cp2_packed": (2, {CP: 2}, None),
    "dp2_packed": (2, {}, None),
    "pp2_interleaved_packed": (2, {PP: 2, VPP: 2}, None),
    "pp2_recompute_full_packed": (2, {PP: 2, "recompute": "full"}, None),
    "dp2_teacher_tp2_packed": (2, {}, {TP: 2}),
    "cp2_tp2_teacher_pp2_cp2_packed": (4, {TP: 2, CP: 2}, {PP: 2, CP: 2}),
    "tp2_teacher_pp2": (2, {TP: 2}, {PP: 2}),
    "tp2_teacher_dp2": (2, {TP: 2}, {}),
    "pp2_teacher_tp2_sp": (2, {PP: 2}, {TP: 2, SP: True}),
    "dp2_teacher_tp2": (2, {}, {TP: 2}),
    "pp2_teacher_interleaved": (2, {PP: 2}, {PP: 2, VPP: 4}),
    "pp2_interleaved_teacher_tp2": (2, {PP: 2, VPP: 2}, {TP: 2}),
    "tp2_pp2_teacher_tp4": (4, {TP: 2, PP: 2}, {TP: 4}),
    "cp2_teacher_tp2": (2, {CP: 2}, {TP: 2}),
    "dp4_teacher_tp2_cp2": (4, {}, {TP: 2, CP: 2}),
    "tp4_teacher_pp4": (4, {TP: 4}, {PP: 4}),
    "dp4_teacher_tp2_pp2": (4, {}, {TP: 2, PP: 2, SP: True}),
    "pp2_dp2_teacher_tp2_dp2": (4, {PP: 2}, {TP: 2}),
    "teacher_apart": (2, {}, {**APART}),
    "tp2_sp_teacher_tp2_apart": (4, {TP: 2, SP: True}, {**APART, TP: 2}),
    "dp2_teacher_pp2_apart": (4, {}, {**APART, PP: 2}),
    "pp2_teacher_dp2_apart_packed": (4, {PP: 2}, {**APART, "replicas": 2}),
    "cp2_teacher_tp2_sp_apart": (4, {CP: 2}, {**APART, TP: 2, SP: True}),
}

# The same of an objective over the whole vocabulary, for which the teacher's hidden states travel.
WHOLE_LAYOUTS = {
    "jsd_pp2_interleaved_teacher_tp2_sp": (2, {PP: 2, VPP: 2}, {TP: 2, SP: True}),
    "jsd_dp2_teacher_tp2_offloaded_packed": (2, {}, {TP: 2, "offload": True}),
    "jsd_tp2_cp2_sp_teacher_pp2_dp2": (4, {TP: 2, CP: 2, SP: True}, {PP: 2}),
    "jsd_tp2_pp2_sp_recompute": (4, {TP: 2, PP: 2, SP: True, "recompute": "full"}, None),
    "jsd_tp2_teacher_dp2_apart": (4, {TP: 2}, {**APART, "replicas": 2}),
}


# The same of models with experts; a teacher's layout of {} is a replica a process.
EXPERT_LAYOUTS = {
    "ep2": (2, {EP: 2}, None),
    "ep4_teacher_tp2": (4, {EP: 4}, {TP: 2}),
    "tp2_ep2_sp": (4, {TP: 2, EP: 2, SP: True}, None),
    "tp2_ep2_sp_experts_whole": (2, {TP: 2, EP: 2, SP: True, ETP: 1}, {EP: 2}),
    "pp2_ep2_interleaved_packed": (4, {PP: 2, VPP: 2, EP: 2}, {EP: 2, "offload": True}),
    "cp2_ep2_overlap": (4, {CP: 2, EP: 2, "recompute": "full"}, {PP: 2, EP: 2}),
    "ep2_teacher_ep2_apart": (4, {EP: 2}, {**APART, EP: 2, "replicas": 2}),
}


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
    return [
        *(f"{role}.hf_path={material / role}" for role in layouts),
        *(f"{role}.dtype=float32" for role in layouts),
        *(f"{role}.{key}={str(value).lower()}" for role, sizes in layouts.items() for key, value in sizes.items()),
        *(f"data.prompts={material / 'prompts.jsonl'}", f"logging.dir={run}", "logging.tensorboard=false"),
        *("rollout.max_new_tokens=12", "rollout.samples_per_prompt=2", "objective.topk=8", "guidance.beta=0.1"),
        *("training.steps=3", "training.prompts_per_step=4", "training.micro_batch_size=1", "training.lr=1e-2"),
        # A large eps keeps rounding errors of tiny gradients from being blown up to whole updates.
        *("training.adam_eps=1e-2", "checkpoint.save_interval=0", "logging.samples=8"),
        *(option for name, option in OPTIONS.items() if name in run.name),
        *(["guidance.schedule=none"] if "jsd" in run.name else []),
        *("evaluation.interval=3", f"evaluation.held_out={material / 'prompts.jsonl'}"),
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
            worst = max(worst, abs(mine[key] - other[key]) / max(1.0, abs(other[key])))
    return worst


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_what_one_process_trains(name, material, single, table, tmp_path):
    compare(name, LAYOUTS[name], material, single, table, tmp_path / name)


@pytest.mark.parametrize("name", WHOLE_LAYOUTS)
def test_every_layout_trains_the_same_divergence(name, material, whole_single, table, tmp_path):
    compare(name, WHOLE_LAYOUTS[name], material, whole_single, table, tmp_path / name)


@pytest.mark.parametrize("name", EXPERT_LAYOUTS)
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
