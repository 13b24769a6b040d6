"""The parallel layouts under which training must give what one process gives, and in which tier of the suite each runs.

A feature is what a layout adds to one process, student and teacher apart. The normal tier has every feature, the tier
`pairs` every pair of features that any layout here has, the tier `full` all layouts; test_tiers.py holds them to it.
"""

import itertools

import pytest

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

ALL = {**LAYOUTS, **WHOLE_LAYOUTS, **EXPERT_LAYOUTS}

# The first twelve have every feature; the other three add sequence parallelism under
# interleaving, a remote teacher's hidden states for replicas, and experts in an interleaved pipeline.
NORMAL = {
    *("tp2_recompute_selective", "pp2_first_stage_of_1", "pp3_counting_embedding_and_loss", "dp2_overlap_gather"),
    *("pp2_recompute_full_packed", "cp2_tp2_teacher_pp2_cp2_packed", "pp2_teacher_interleaved", "teacher_apart"),
    *("pp2_teacher_dp2_apart_packed", "jsd_pp2_interleaved_teacher_tp2_sp", "jsd_dp2_teacher_tp2_offloaded_packed"),
    "tp2_ep2_sp_experts_whole",
    *("tp2_pp2_sp_interleaved", "jsd_tp2_teacher_dp2_apart", "pp2_ep2_interleaved_packed"),
}
# These have, with those above, every pair of features.
PAIRS = {
    *("pp2_cp2", "tp2_sp_packed", "pp2_dp2_overlap_gather", "pp2_dp2_interleaved_overlap", "dp4_teacher_tp2_cp2"),
    *("dp4_teacher_tp2_pp2", "tp2_sp_teacher_tp2_apart", "dp2_teacher_pp2_apart", "cp2_teacher_tp2_sp_apart"),
    *("jsd_tp2_cp2_sp_teacher_pp2_dp2", "jsd_tp2_pp2_sp_recompute", "ep4_teacher_tp2", "tp2_ep2_sp"),
    *("cp2_ep2_overlap", "ep2_teacher_ep2_apart"),
}

_FEATURES = {TP: "tp", PP: "pp", VPP: "vpp", SP: "sp", CP: "cp", EP: "ep", ETP: "etp"}


def features(name):
    """Return what a layout adds to one process; a teacher in the student's layout adds nothing."""
    processes, student, teacher = ALL[name]
    found = {option for option in OPTIONS if option in name}
    if teacher is None:
        return found | _features_of_model("student", student, processes)
    own = _ranks(teacher) * teacher.get("replicas", 1) if "ranks" in teacher else 0
    found.add("teacher apart" if own else "teacher in another layout")
    return (
        found
        | _features_of_model("student", student, processes - own)
        | _features_of_model("teacher", teacher, own or processes)
    )


def pairs(name):
    """Return every pair of a layout's features."""
    return set(itertools.combinations(sorted(features(name)), 2))


def _ranks(model):
    return model.get(TP, 1) * model.get(PP, 1) * model.get(CP, 1)


def _features_of_model(role, model, processes):
    found = {f"{role} dp"} if processes > _ranks(model) else set()
    for key, value in model.items():
        if key.startswith(("num_layers_in_", "account_for_")):
            found.add(f"{role} uneven")
        elif key == "recompute":
            found.add(f"{role} recompute {value}")
        elif key != "ranks":
            found.add(f"{role} {_FEATURES.get(key, key)}")
    return found


def in_tiers(layouts):
    """Return a layout's name per test, marked with the tier that it first runs in."""
    marks = {name: () if name in NORMAL else pytest.mark.pairs if name in PAIRS else pytest.mark.full for name in ALL}
    return [pytest.param(name, marks=marks[name]) for name in layouts]
