"""The whole loop on small random models: the same losses under every layout, exact resume, checkpoints, bad input."""

import datetime
import importlib
import json
import logging
import os
import signal
from pathlib import Path

import pytest
import torch
from support.helpers import PATIENCE, open_store, run_distributed
from support.tiny_models import write_model
from support.train_runs import (
    APART,
    PP2,
    TIMES,
    TP2,
    assert_same,
    overrides_of,
    records,
    refused_rank,
    train_rank,
    weights_of,
)


def test_a_single_process_reports_every_promised_number(single):
    promised = (
        *("loss", "loss_trust", "loss_outlier", "loss_guidance", "trust_fraction", "mean_rho", "outlier_fraction"),
        *("outlier_forward_kl", "advantage", "advantage_max", "advantage_min", "grad_norm", "student_entropy"),
        *("teacher_entropy", "response_length", "finish_eos", "finish_length", "logprob_mismatch", *TIMES),
    )
    middle = single[2]
    assert set(promised) <= middle.keys()
    assert 0 < middle["trust_fraction"] < 1
    assert middle["trust_fraction"] + middle["outlier_fraction"] == pytest.approx(1)
    assert middle["logprob_mismatch"] < 1e-4
    assert [r["prefix_fraction"] for r in single] == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466])


@pytest.mark.parametrize("options", [["training.use_distributed_optimizer=false"], ["training.micro_batch_size=4"]])
def test_optimizer_sharding_and_micro_batch_size_do_not_change_the_losses(options, material, single, tmp_path):
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    assert_same(records(tmp_path), single, tolerance=2e-4)


def test_bfloat16_with_fp32_main_weights_trains_close_to_float32(material, single, tmp_path):
    options = ["student.dtype=bfloat16", "teacher.dtype=bfloat16", *TP2]
    run_distributed(train_rank, 2, overrides_of(material, tmp_path, *options))
    ours = records(tmp_path)
    assert ours[0]["loss_guidance"] == pytest.approx(single[0]["loss_guidance"], rel=0.05)
    assert all(0 <= r["logprob_mismatch"] < 0.2 for r in ours[1:])


# name -> (processes, options). tests/parity compares layouts with one process; here a resumed run is compared with an
# uninterrupted one of the same layout.
RESUMED = {
    "single": (1, []),
    "tp2": (2, TP2),
    "pp2_plain_optimizer": (2, ["training.use_distributed_optimizer=false", *PP2]),
    "pp2_teacher_apart": (3, ["student.pipeline_model_parallel_size=2", *APART]),
    "dp2_bfloat16_overlap": (
        2,
        ["student.dtype=bfloat16", "training.overlap_grad_reduce=true", "training.overlap_param_gather=true"],
    ),
    "bfloat16_optimizer_offloaded": (1, ["student.dtype=bfloat16", "training.offload_optimizer=true"]),
    "experts_ep2": (2, ["student.hf_path={material}/experts", "student.expert_model_parallel_size=2"]),
    "pp2_interleaved_teacher_dp2": (
        2,
        ["student.pipeline_model_parallel_size=2", "student.virtual_pipeline_model_parallel_size=2"],
    ),
    "cp2_teacher_tp2": (2, ["student.context_parallel_size=2", "teacher.tensor_model_parallel_size=2"]),
}
RESUMED_ALWAYS = ("single", "tp2", "pp2_plain_optimizer", "pp2_teacher_apart")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in RESUMED_ALWAYS else pytest.mark.full) for n in RESUMED]
)
def test_two_steps_and_two_more_equal_four_to_the_bit(name, material, tmp_path):
    processes, options = RESUMED[name]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = [option.replace("{material}", str(material)) for option in options]
    schedule = ["training.lr_schedule=cosine", "training.lr_warmup_steps=1", *options]
    run_distributed(train_rank, processes, overrides_of(material, whole, *schedule))
    run_distributed(train_rank, processes, overrides_of(material, halves, *schedule, "training.exit_step=2"))
    assert (halves / "checkpoints" / "step_000002").is_dir()
    run_distributed(train_rank, processes, overrides_of(material, halves, *schedule))
    assert_same(records(halves), records(whole), tolerance=0.0)
    for part in ("model", "optimizer"):
        ours, theirs = (weights_of(run / "checkpoints" / "step_000004" / part) for run in (halves, whole))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(ours) > 10
    assert len({record["learning_rate"] for record in records(whole)}) > 2  # the schedule continues, too


def test_a_run_resumes_under_another_layout(material, single, tmp_path):
    run_distributed(train_rank, 2, overrides_of(material, tmp_path, "training.exit_step=2", *PP2))
    run_distributed(train_rank, 2, overrides_of(material, tmp_path, *TP2))
    assert_same(records(tmp_path), single, tolerance=5e-4)


def test_training_again_after_the_end_does_nothing(material, tmp_path):
    for _ in range(2):
        (summary,) = run_distributed(train_rank, 1, overrides_of(material, tmp_path, "training.steps=1"))
    assert summary["finished"]
    assert len(records(tmp_path)) == 1


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(material, single, tmp_path):
    options = ["checkpoint.save_interval=1", "checkpoint.keep=0"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options, "training.exit_step=3"))
    newest = tmp_path / "checkpoints" / "step_000003"
    data = next((newest / "model").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    assert_same(records(tmp_path), single, tolerance=1e-6)


def test_only_the_newest_checkpoints_are_kept(material, tmp_path):
    options = ["checkpoint.save_interval=1", "checkpoint.keep=2"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_000003", "step_000004"]


def train_until_terminated(overrides: list[str], pids: Path) -> dict:
    """SIGTERM comes right after the second step: to the student's first rank, and to a teacher's own."""
    rank = os.environ["RANK"]
    (pids / rank).write_text(str(os.getpid()))

    class Terminate(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("saved"):
                for pid in (pids / name for name in ("2", "0") if (pids / name).exists()):
                    os.kill(int(pid.read_text()), signal.SIGTERM)

    if rank == "0":  # in the thread that trains, which does not go on meanwhile
        logger = logging.getLogger("megatron_tropd.training.loop")
        logger.setLevel(logging.INFO)
        logger.addHandler(Terminate())
    return train_rank(overrides)


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(2, TP2), (3, ["student.tensor_model_parallel_size=2", *APART])],
    ids=["tp2", "tp2_teacher_apart"],
)
def test_sigterm_saves_and_the_run_continues_exactly(processes, layout, material, tmp_path):
    whole, cut, pids = (tmp_path / name for name in ("whole", "cut", "pids"))
    pids.mkdir()
    options = ["training.steps=5", *layout]
    run_distributed(train_rank, processes, overrides_of(material, whole, *options))
    options += ["checkpoint.save_interval=2"]
    summaries = run_distributed(train_until_terminated, processes, overrides_of(material, cut, *options), pids)
    assert {summary["steps"] for summary in summaries} == {3}  # no step at which it saves anyway
    assert not summaries[0]["finished"]
    assert (cut / "checkpoints" / "step_000003").is_dir()
    run_distributed(train_rank, processes, overrides_of(material, cut, *options))
    assert_same(records(cut), records(whole), tolerance=0.0)


OTHERS = ["opd", "tropd_mask", "clip_outlier", "fkl_topk", "eopd", "topd", "entropy_opd", "sft"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_objectives_train(name, material, tmp_path):
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, f"objective.name={name}", "training.steps=2"))
    assert all(r["loss"] is not None for r in records(tmp_path))


def test_reopold_explores_then_refines(material, tmp_path):
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, "objective.name=reopold"))
    found = records(tmp_path)
    assert len(found) == 4
    assert all(0.2 <= r["selected_fraction"] <= 0.25 for r in found[2:])  # the share of uncertain tokens, rounded up
    assert all(r["selected_fraction"] > 0.25 for r in found[:2])


def test_a_longer_run_of_reopold_does_not_explore_again(material, tmp_path):
    options = ["objective.name=reopold", "training.exit_step=3"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    longer = ["objective.name=reopold", "training.steps=8", "training.exit_step=4"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *longer))
    found = records(tmp_path)
    assert [r["selected_fraction"] > 0.25 for r in found] == [True, True, False, False]


def test_the_same_uncertain_tokens_are_chosen_in_every_layout(material, tmp_path):
    """Their entropies come from a separate forward pass, over context shares and interleaved stages, too."""
    both = ("student", "teacher")
    layouts = {
        "alone": (1, []),
        "cp2": (2, [f"{role}.context_parallel_size=2" for role in both]),
        "pp2_interleaved": (2, [*PP2, "student.virtual_pipeline_model_parallel_size=2"]),
    }
    for name, (ranks, layout) in layouts.items():
        options = ["objective.name=entropy_opd", "training.exit_step=2", *layout]
        run_distributed(train_rank, ranks, overrides_of(material, tmp_path / name, *options))
        assert_same(records(tmp_path / name), records(tmp_path / "alone"), tolerance=1e-4)


def test_filters_find_and_weigh_the_same_responses_in_every_layout(material, tmp_path):
    """Responses of a random model are cut or repeat themselves: every step has some of each."""
    options = ["rollout.on_truncated=downweight", "rollout.on_repeating=mask", "rollout.on_duplicate=drop"]
    options += ["rollout.repetition_ngram=1", "rollout.repetition_above=0.1"]
    layouts = {
        "alone": (1, []),
        "dp2_packed": (2, ["training.max_tokens_per_micro_batch=64"]),
        "cp2": (2, [f"{role}.context_parallel_size=2" for role in ("student", "teacher")]),
    }
    for name, (ranks, layout) in layouts.items():
        run_distributed(train_rank, ranks, overrides_of(material, tmp_path / name, *options, *layout))
        found = records(tmp_path / name)
        assert_same(found, records(tmp_path / "alone"), tolerance=1e-4)
    assert sum(record["filtered_truncated"] for record in found) > 0
    assert sum(record["filtered_repeating"] for record in found) > 0
    assert all(0 <= record["filtered_fraction"] <= 1 for record in found)
    assert "filtered_empty" not in found[0]


def test_sft_lowers_the_loss(material, tmp_path):
    options = ["objective.name=sft", "training.steps=12", "training.prompts_per_step=7", "data.shuffle=false"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path, *options))
    losses = [r["loss"] for r in records(tmp_path)]
    assert losses[-1] < 0.6 * losses[0]


def test_evaluations_samples_and_held_out_divergence_are_written(material, tmp_path):
    options = [
        f"evaluation.problems={material / 'prompts.jsonl'}",
        f"evaluation.held_out={material / 'prompts.jsonl'}",
        *("evaluation.interval=2", "logging.samples=2", *PP2),
    ]
    summary = run_distributed(train_rank, 2, overrides_of(material, tmp_path, *options))[0]
    assert [e["step"] for e in summary["evaluations"]] == [0, 2, 4]
    assert all(0 <= e["accuracy"] <= 1 and e["held_out_kl"] > 0 for e in summary["evaluations"])
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    kinds = {token["kind"] for sample in samples for token in sample["tokens"]}
    assert kinds == {"trust", "outlier", "guidance"}


def test_field_cases_a6_nothing_is_generated_after_a_response_that_was_cut(material, tmp_path):
    """`sft` on a response without EOS: the student would otherwise go on writing, and be trained on its own words."""
    prompts = [json.loads(line) for line in (material / "prompts.jsonl").read_text().splitlines()]
    cut = tmp_path / "cut.jsonl"
    cut.write_text(
        "".join(json.dumps({**p, "teacher_response": "it", "finish_reason": "length"}) + "\n" for p in prompts)
    )
    options = ["objective.name=sft", "training.steps=1", f"data.prompts={cut}"]
    run_distributed(train_rank, 1, overrides_of(material, tmp_path / "run", *options))
    (record,) = records(tmp_path / "run")
    assert (record["finish_length"], record["response_length"]) == (1, 0)
    assert record["num_loss_tokens"] == 4 * record["prefix_length"] > 0


BAD_INPUT = {
    "student.tensor_model_parallel_size=3 teacher.tensor_model_parallel_size=3": "attention heads",
    "student.pipeline_model_parallel_size=3 teacher.pipeline_model_parallel_size=3": "4 layers",
    "rollout.max_new_tokens=300": "context of 256",
    "data.max_prompt_tokens=3": "line 1",
    "training.prompts_per_step=3": "data-parallel ranks",
    "student.hf_path=nowhere": "no such folder",
    "data.prompts=nowhere.jsonl": "nowhere.jsonl",
    "training.max_tokens_per_micro_batch=20": "use at least",
    "student.expert_model_parallel_size=2": "has no experts",
    "teacher.ranks=dedicated teacher.tensor_model_parallel_size=2": "leaves the student none of 2",
    "teacher.ranks=dedicated student.tensor_model_parallel_size=2": "1 process(es) beside the other model's 1 cannot",
    "teacher.ranks=dedicated data.prompts=nowhere.jsonl": "nowhere.jsonl",
    "teacher.ranks=dedicated teacher.hf_path={material}/unweighed": "holds no model*.safetensors files",
    "student.hf_path={material}/experts training.prompts_per_step=6 student.expert_model_parallel_size=3": "[1, 2, 4]",
    "student.hf_path={material}/experts student.tensor_model_parallel_size=2": "needs student.sequence_parallel=true",
}


def each_refused_rank(runs: dict[str, list[str]], ports: list[int]) -> dict[str, str]:
    """Return the messages by the name of the run; each run has a separate store, as under a launcher."""
    from megatron_tropd.parallel.groups import shutdown

    importlib.import_module("megatron_tropd.training.loop").shutdown = lambda: (
        None
    )  # not before all ranks have been refused
    messages = {}
    for (name, overrides), port in zip(runs.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        messages[name] = refused_rank(overrides)
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)
        if store.add("refused", 1) == int(os.environ["WORLD_SIZE"]):
            store.set("all are", "")
        store.wait(["all are"], datetime.timedelta(seconds=PATIENCE))
        shutdown()
    return messages


@pytest.fixture(scope="module")
def bad_input(material, tmp_path_factory):
    """Every rank's message and the run's folder by the options that are refused."""
    root, messages = tmp_path_factory.mktemp("bad"), {}
    folders = {options: root / str(i) for i, options in enumerate(BAD_INPUT)}
    for processes in (2, 3):
        runs = {
            options: overrides_of(material, folder, *options.replace("{material}", str(material)).split())
            for options, folder in folders.items()
            if processes == (3 if "size=3" in options else 2)
        }
        stores = [open_store() for _ in runs]
        ranks = run_distributed(each_refused_rank, processes, runs, [store.port for store in stores])
        messages |= {options: [rank[options] for rank in ranks] for options in runs}
    return {options: (messages[options], folders[options]) for options in BAD_INPUT}


@pytest.mark.parametrize("options", BAD_INPUT, ids=lambda o: o.split()[-1])
def test_bad_input_is_refused_before_training_on_every_rank(options, bad_input):
    messages, folder = bad_input[options]
    assert len(messages) > 1
    assert all(BAD_INPUT[options] in message for message in messages)
    assert not (folder / "metrics.jsonl").exists()


def test_teachers_of_another_vocabulary_and_the_student_itself_are_refused(material, tmp_path):
    write_model(tmp_path / "other", "llama", vocab_size=140)
    options = overrides_of(material, tmp_path, f"teacher.hf_path={tmp_path / 'other'}")
    (message,) = run_distributed(refused_rank, 1, options)
    assert "id 131: student nothing, teacher '<filler" in message
    options = overrides_of(material, tmp_path, f"teacher.hf_path={material / 'student'}")
    (message,) = run_distributed(refused_rank, 1, options)
    assert "same weights" in message


def test_each_stage_of_a_step_has_its_own_memory_peak(monkeypatch):
    """Between two laps the device's peak is read once and then forgotten; on a CPU it is the process's memory."""
    from megatron_tropd.training.loop import _Clock

    peaks, calls = iter([3e9, 7e9, 5e9]), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: calls.append("read") or next(peaks))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("forget"))
    clock = _Clock(torch.device("cuda"))
    for name in TIMES[:3]:
        clock.lap(name)
    assert clock.peaks == {"memory_rollout_gb": 3.0, "memory_teacher_gb": 7.0, "memory_update_gb": 5.0}
    assert calls == ["forget", *["wait", "read", "forget"] * 3]
    assert set(clock.laps) == set(TIMES[:3])
    on_cpu = _Clock(torch.device("cpu"))
    on_cpu.lap("seconds_update")
    assert list(on_cpu.laps) == ["seconds_update"]
    assert list(on_cpu.peaks) == ["memory_update_gb"]
    assert 0.1 < on_cpu.peaks["memory_update_gb"] < 100


def largest_peaks_rank() -> dict[str, float]:
    import torch.distributed as dist

    from megatron_tropd.training.loop import _largest_peaks

    dist.init_process_group("gloo")
    mine = {
        0: {"memory_rollout_gb": 3.0, "memory_update_gb": 1.0},
        1: {"memory_rollout_gb": 2.0, "memory_update_gb": 4.0},
    }
    device = torch.device("cpu")
    return _largest_peaks(mine[dist.get_rank()], device)


def test_memory_peaks_are_those_of_the_fullest_rank():
    assert run_distributed(largest_peaks_rank, 2) == [{"memory_rollout_gb": 3.0, "memory_update_gb": 4.0}] * 2
