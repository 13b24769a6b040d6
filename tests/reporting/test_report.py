"""The report: its keys against those of a real run, its data against the records, bad folders, sizes and the watch."""

import base64
import gzip
import html
import json
import re
import shutil
import threading
import time

import pytest
from support.report_runs import read, repeat_run

from megatron_tropd.cli import main
from megatron_tropd.errors import UserError
from megatron_tropd.reporting import report
from megatron_tropd.reporting.head import facts, method, sentence
from megatron_tropd.reporting.plots import PLOTS, keys_of
from megatron_tropd.reporting.recipe_view import differences, settings
from megatron_tropd.reporting.report import MAX_POINTS, watch, write_report
from megatron_tropd.reporting.run_records import read_run
from megatron_tropd.reporting.texts import pack_answers, pack_samples, spaced


def contents(page):
    """Return what a page holds: the data and the texts."""
    text = page.read_text(encoding="utf-8")
    blocks = (re.search(rf'id="{name}">([^<]+)<', text)[1] for name in ("data", "texts"))
    return [json.loads(gzip.decompress(base64.b64decode(block))) for block in blocks]


def writable(run, folder):
    """Return a copy of a run."""
    return shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))


@pytest.mark.parametrize("source", ["metrics", "evaluations"])
def test_every_key_of_the_plots_is_recorded_by_a_real_run(recorded_run, source):
    recorded = {key for record in read(recorded_run / f"{source}.jsonl") for key in record}
    assert keys_of(source) <= recorded


def test_every_plot_of_a_real_run_has_numbers(recorded_run, tmp_path):
    data, _ = contents(write_report(recorded_run, tmp_path))
    (run,) = data["runs"]
    drawn = [p["name"] for p in data["plots"] if any(run[p["source"]].get(s["key"]) for s in p["series"])]
    assert drawn == [plot.name for plot in PLOTS]
    assert run["notes"] == []


def test_the_page_holds_the_records(recorded_run, tmp_path):
    data, texts = contents(write_report(recorded_run, tmp_path))
    (run,), records = data["runs"], read(recorded_run / "metrics.jsonl")
    assert run["metrics"]["x"] == [1, 2, 3, 4]
    assert run["metrics"]["rho_histogram"] == [record.get("rho_histogram") for record in records]
    for key in ("loss", "advantage_p50", "gradient_share_outlier", "memory_update_gb"):
        there = [i for i, record in enumerate(records) if record.get(key) is not None]
        assert [run["metrics"][key][i] for i in there] == pytest.approx([records[i][key] for i in there], rel=1e-4)
        assert len(there) > 2
    generated = [record["generated_tokens"] for record in records]
    assert run["metrics"]["tokens"] == [sum(generated[: i + 1]) for i in range(4)]
    assert run["evaluations"]["x"] == [0, 2, 4]
    assert run["evaluations"]["tokens"] == [0, sum(generated[:2]), sum(generated)]
    packed = texts[0]["samples"]
    originals = read(recorded_run / "samples.jsonl")
    assert len(packed["samples"]) == len(originals)
    for ours, original in zip(packed["samples"], originals, strict=True):
        tokens = original["tokens"]
        assert [packed["texts"][place] for place in ours["t"]] == [token["text"] for token in tokens]
        assert ours["k"] == "".join({"trust": "0", "outlier": "1", "guidance": "2"}[t["kind"]] for t in tokens)
        for short, name in (("s", "student_logprob"), ("l", "teacher_logprob")):
            numbers = [None if token.get(name) is None else token[name] for token in tokens]
            assert ours[short] == [None if x is None else round(1000 * x) for x in numbers]
    assert any("alternatives" in token for sample in originals for token in sample["tokens"])
    assert any("a" in sample for sample in packed["samples"])


def test_the_teachers_alternatives_are_its_most_probable_tokens(recorded_run):
    tokens = [t for s in read(recorded_run / "samples.jsonl") for t in s["tokens"] if t["kind"] != "guidance"]
    assert tokens
    for token in tokens:
        logprobs = [value for _, value in token["alternatives"]]
        assert len(logprobs) == 5
        assert logprobs == sorted(logprobs, reverse=True)
        assert token["teacher_logprob"] <= logprobs[0] + 1e-3
        for text, value in token["alternatives"]:
            if text == token["text"] and text.strip():
                assert value == pytest.approx(token["teacher_logprob"], abs=1e-3)


def test_answers_are_those_of_the_same_problems_at_every_evaluation(recorded_run):
    answers = read(recorded_run / "answers.jsonl")
    assert [a["step"] for a in answers] == [0] * 7 + [2] * 7 + [4] * 7
    assert [a["id"] for a in answers] == [f"p{i}" for i in range(7)] * 3
    packed = pack_answers(recorded_run / "answers.jsonl", [])
    assert packed["steps"] == [0, 2, 4]
    assert packed["problems"][3]["prompt"] == "user: add <b>3</b> & 9"
    assert packed["problems"][3]["answer"] == "12"
    assert packed["problems"][3]["by_step"].keys() == {0, 2, 4}


def test_the_page_is_self_contained_and_escapes_what_comes_from_data(recorded_run, tmp_path):
    run = writable(recorded_run, tmp_path / "<b>{{data}}")
    page = write_report(run)
    text = page.read_text(encoding="utf-8")
    head = text[: text.index('<script type="text/plain"')]
    assert html.escape("<b>{{data}}") in head
    assert "<b>{{data}}" not in text
    outside = re.sub(r'<script type="text/plain".*?</script>', "", text, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:)""", outside)
    assert not re.findall(r"https?://", outside)
    assert page.stat().st_size < 4e6


def test_the_result_in_one_sentence(tmp_path, recorded_run):
    run = read_run(writable(recorded_run, tmp_path / "run"))
    run.evaluations = [
        {"step": 0, "accuracy": 0.25, "held_out_kl": 0.5},
        {
            **{"step": 4, "accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8},
            **{"held_out_kl": 0.125, "held_out_kl_low": 0.1, "held_out_kl_high": 0.15},
        },
    ]
    assert sentence(run) == (
        "After 4 steps, the student answers 75.0% of the problems correctly (95% interval 70.0% to 80.0%), 25.0% "
        "before; the divergence from the teacher on held-out prompts is 0.125 nats per token (95% interval 0.1 to "
        "0.15), 0.5 before."
    )
    del run.evaluations[1]
    assert "(evaluated after 0) the student answers 25.0%" in sentence(run)
    run.evaluations = []
    assert sentence(run).startswith("After 4 steps: nothing was evaluated (evaluation.problems, evaluation.held_out).")
    run.metrics = []
    assert sentence(run) == "No step is recorded yet."


def test_the_facts_of_a_run(recorded_run):
    found = dict(facts(read_run(recorded_run)))
    assert found["State"] == "finished: 4 of 4 steps"
    assert re.search(r"student \(llama, [\d.]+ k parameters\)", found["Student"])
    assert found["Method"] == (
        "tropd: bernoulli gate, forward KL to the teacher's top 8 on outliers, cosine guidance from 1.0"
    )
    assert found["Layout"] == "student DP 1, teacher unsharded"
    assert re.search(r"; 1 process on 1 node$", found["Hardware"])
    assert "torch 2" in found["Versions"]
    assert found.keys() >= {"Started", "Time", "Tokens", "Commit", "Teacher", "Command"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective.name": "opd"}, "opd: K1 on every token"),
        (
            {"objective.name": "tropd_mask"},
            "tropd_mask: bernoulli gate, no loss on outliers",
        ),
        (
            {"objective.name": "clip_outlier", "objective.clip": -2.0, "objective.gate": "soft"},
            "clip_outlier: soft gate, advantage clipped at -2.0 on outliers",
        ),
        ({}, ""),
    ],
)
def test_the_method_in_words(settings, words):
    assert method(settings) == words


def test_every_method_has_words():
    from megatron_tropd.methods import METHODS

    for name, kind in METHODS.items():
        words = method({"objective.name": name, "objective.topk": 64, "objective.clip": -2.0})
        assert ("gate" in words) == kind.gated, words
        assert not re.search(r"[{}]", words)


def test_what_else_was_measured_and_which_steps_were_skipped(recorded_run, tmp_path):
    run = writable(recorded_run, tmp_path / "run")
    extra = [
        {"step": 0, "pass_at_8": 0.25, "accuracy/algebra": 0.5},
        {"step": 4, "pass_at_8": 0.75, "accuracy/algebra": 1},
    ]
    with open(run / "evaluations.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in extra)
    summary = json.loads((run / "summary.json").read_text())
    summary["skipped_steps"] = [{"step": i, "reason": "loss spike"} for i in range(10)]
    (run / "summary.json").write_text(json.dumps(summary))
    found = dict(facts(read_run(run)))
    assert found["Also measured"] == "pass@8 25.0% → 75.0%, algebra 50.0% → 100.0%"
    assert found["Skipped"].startswith("10 steps without an update: 0 (loss spike), 1 (loss spike)")
    assert found["Skipped"].endswith("7 (loss spike), and 2 more")


def test_samples_without_alternatives_say_why(recorded_run, tmp_path):
    run = writable(recorded_run, tmp_path / "run")
    note = "No alternatives of the teacher: this objective reads none of its most probable tokens."
    assert note not in contents(write_report(run))[0]["runs"][0]["notes"]
    records = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    for token in (token for record in records for token in record["tokens"]):
        token.pop("alternatives", None)
    (run / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert note in contents(write_report(run))[0]["runs"][0]["notes"]


def test_a_recipes_differences_from_the_defaults(recorded_run):
    rows = {row["key"]: row for row in settings(read_run(recorded_run))}
    assert rows["data.columns.prompt"]["value"] == "null"
    assert not rows["data.columns.prompt"]["changed"]
    assert rows["training.steps"] | {"help": ""} == {
        **{"key": "training.steps", "value": "4", "default": "200", "help": "", "changed": True}
    }
    assert not rows["training.optimizer"]["changed"]
    assert rows["training.optimizer"]["help"]


def test_several_runs_are_told_apart_and_compared(recorded_run, tmp_path):
    one, two = (writable(recorded_run, tmp_path / name / "train") for name in ("one", "two"))
    recipe = (two / "recipe.yaml").read_text()
    recipe = recipe.replace("lr: 0.01", "lr: 0.02").replace("  topk: 8\n", "") + "odd:\n  key: 1\n"
    (two / "recipe.yaml").write_text(recipe)
    page = write_report([one, two])
    assert page == tmp_path / "one" / "comparison" / "report.html"
    data, _ = contents(page)
    assert [run["name"] for run in data["runs"]] == ["one/train", "two/train"]
    assert {row["key"]: row["values"] for row in data["differences"]} == {
        "training.lr": ["0.01", "0.02"],
        "objective.topk": ["8", "null"],
        "odd.key": ["null", "1"],
    }
    assert differences([read_run(one), read_run(one)]) == []


def test_a_run_in_a_folder_of_any_name_is_called_by_two(recorded_run, tmp_path):
    data, _ = contents(write_report(writable(recorded_run, tmp_path / "quick" / "train")))
    assert data["runs"][0]["name"] == "quick/train"


def test_missing_and_damaged_files_are_left_out_with_a_note(recorded_run, tmp_path):
    run = writable(recorded_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "{ damaged }\n" + "".join(lines[2:]) + '{"step": 9, "lo')
    samples = (run / "samples.jsonl").read_bytes()
    (run / "samples.jsonl").write_bytes(b"\xff\xfe\n" + samples)
    (run / "answers.jsonl").unlink()
    (run / "recipe.yaml").write_text("training: [")
    (run / "summary.json").write_text('{"steps": ')
    (run / "run.json").unlink()
    data, texts = contents(write_report(run))
    (shown,) = data["runs"]
    assert shown["metrics"]["x"] == [1, 3, 4]
    assert len(texts[0]["samples"]["samples"]) == len(samples.splitlines())
    assert texts[0]["answers"] == {"steps": [], "problems": []}
    notes = "\n".join(shown["notes"])
    for note in (
        *("metrics.jsonl: damaged line left out (line 2).", "samples.jsonl: damaged line left out (line 1)."),
        *("recipe.yaml is damaged", "summary.json is damaged", "run.json is missing"),
    ):
        assert note in notes
    for name in ("samples", "evaluations"):
        (run / f"{name}.jsonl").unlink()
    (run / "metrics.jsonl").write_text("")
    notes = "\n".join(contents(write_report(run))[0]["runs"][0]["notes"])
    assert "metrics.jsonl holds no step yet." in notes
    assert "samples.jsonl is missing or empty: no responses (logging.samples)." in notes


@pytest.mark.parametrize("value", ["null", "[]", '"text"', "NaN", '{"step": "one"}', '{"step": 1, "loss": "high"}'])
def test_odd_records_make_no_traceback(recorded_run, tmp_path, value):
    run = writable(recorded_run, tmp_path / "run")
    for name in ("metrics", "evaluations", "samples", "answers"):
        with open(run / f"{name}.jsonl", "a") as file:
            file.write(f"{value}\n")
    for name in ("run", "summary"):
        (run / f"{name}.json").write_text(f"{value}\n")
    write_report(run)


def test_wrong_folders_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no metrics.jsonl; give the folder of a run"):
        write_report(tmp_path / "empty")
    assert main(["report", str(tmp_path / "absent")]) == 2
    assert re.search(r"absent is no folder; give the folder of a run", capsys.readouterr().err)


def test_an_output_that_cannot_be_written_is_named(recorded_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*folder: .*file is no folder, so nothing can be written there"):
        write_report(recorded_run, tmp_path / "file" / "folder")


def test_a_page_of_another_origin_is_left_as_it_is(recorded_run, tmp_path):
    page = tmp_path / "report.html"
    page.write_text("<!doctype html><html><h1>mine</h1>")
    with pytest.raises(UserError, match=r"--output holds .*report.html, which is not a report of this program"):
        write_report(recorded_run, tmp_path)
    assert "mine" in page.read_text()
    page.write_text(
        '<!doctype html><html lang="en"><head></head><body><table><tr><th>run</th></tr></table><h2>Settings</h2></body>'
    )
    assert write_report(recorded_run, tmp_path) == page  # an earlier version's
    first = page.read_bytes()
    assert write_report(recorded_run, tmp_path) == page
    assert len(first) > 1e6


def test_without_plotly_it_says_what_to_install(recorded_run, tmp_path, monkeypatch):
    report._plotly.cache_clear()
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'plotly"):
        write_report(recorded_run, tmp_path)
    report._plotly.cache_clear()


def test_a_thousand_steps_stay_small(recorded_run, tmp_path):
    run = repeat_run(recorded_run, tmp_path / "long", 1000)
    page = write_report(run)
    assert page.stat().st_size < 8e6
    data, texts = contents(page)
    assert len(data["runs"][0]["metrics"]["loss"]) == 1000
    assert len(texts[0]["samples"]["samples"]) == 2000


def test_very_long_runs_and_large_samples_are_thinned_and_say_so(recorded_run, tmp_path):
    run = repeat_run(recorded_run, tmp_path / "long", 2 * MAX_POINTS + 4)
    data, _ = contents(write_report(run))
    assert len(data["runs"][0]["metrics"]["x"]) == len(data["runs"][0]["metrics"]["loss"]) <= MAX_POINTS
    assert "Plots show one of 3 steps (4,004 in all)." in data["runs"][0]["notes"]
    notes = []
    steps = {s["step"] for s in pack_samples(run / "samples.jsonl", notes, max_bytes=200_000)["samples"]}
    assert {0, 4003} <= steps
    assert 2 < len(steps) < 1000
    assert f"responses of {len(steps)} of its steps are shown" in notes[0]
    assert spaced(list(range(100)), 4) == [0, 33, 66, 99]


def test_long_responses_are_cut_with_a_note(tmp_path):
    token = {"text": "x", "kind": "trust", "student_logprob": -1.0, "teacher_logprob": -2.0}
    record = {
        "step": 0,
        "sample_id": 0,
        "prompt_id": "p",
        "prompt": "q" * 9000,
        "tokens": [{**token, "alternatives": [["x", -0.5]]}] * 2500,
    }
    (tmp_path / "samples.jsonl").write_text(json.dumps(record) + "\n")
    notes = []
    packed = pack_samples(tmp_path / "samples.jsonl", notes)
    assert len(packed["samples"][0]["t"]) == 2000
    assert packed["texts"][packed["samples"][0]["prompt"]].endswith("… (5,000 more characters)")
    assert notes == ["samples.jsonl: long responses (1) are shown up to their first 2,000 tokens."]


def test_a_watch_writes_again_until_the_run_has_finished(recorded_run, tmp_path):
    run = writable(recorded_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    summary = (run / "summary.json").read_text()
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    written = []
    thread = threading.Thread(target=watch, args=([run], None, 0.05, written.append))
    thread.start()
    page = run / "report.html"
    _until(lambda: written and contents(page)[0]["runs"][0]["metrics"]["x"] == [1, 2])
    assert contents(page)[0]["refresh"] == 0.05
    (run / "metrics.jsonl").write_text("".join(lines))
    _until(lambda: contents(page)[0]["runs"][0]["metrics"]["x"] == [1, 2, 3, 4])
    (run / "summary.json").write_text(summary)
    thread.join(60)
    assert not thread.is_alive()
    assert contents(page)[0]["refresh"] is None
    assert written == [page]


def _until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
