"""The report in headless Chromium: draws without an error, its hover shows numbers, its search finds a token."""

import json
import math
import re
import shutil
import time

import pytest
from support.chromium import Chromium, find_chromium
from support.report_runs import read

from megatron_tropd.reporting.plots import PLOTS
from megatron_tropd.reporting.report import write_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium here: apt-get install chromium")


@pytest.fixture(scope="module")
def browser():
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def page(recorded_run, tmp_path_factory):
    return write_report(recorded_run, tmp_path_factory.mktemp("page"))


@pytest.fixture
def shown(browser, page):
    """The browser with the page freshly opened."""
    browser.errors.clear()
    browser.run("try { sessionStorage.clear() } catch {}")
    browser.resize(1400, 900)
    browser.open(page)
    yield browser
    assert browser.errors == []


DRAWN = "[...document.querySelectorAll('.plot')].filter(p => p.querySelector('svg.main-svg')).map(p => p.dataset.plot)"


def draw_all(browser):
    """Scroll every plot into sight and wait until it is drawn."""
    browser.run("document.querySelectorAll('.plot').forEach(p => p.scrollIntoView())")
    for plot in PLOTS:
        browser.run(f"document.querySelector('[data-plot={plot.name}]').scrollIntoView({{block: 'center'}})")
        browser.wait(f"({DRAWN}).includes('{plot.name}')")


@pytest.mark.parametrize(("width", "mobile"), [(1400, False), (420, True)])
def test_every_plot_is_drawn_within_the_window(shown, width, mobile):
    shown.resize(width, 900, mobile)
    draw_all(shown)
    assert shown.run(DRAWN) == [plot.name for plot in PLOTS]
    assert shown.run("document.documentElement.scrollWidth") <= width
    assert shown.run("document.querySelectorAll('.plot.empty').length") == 0
    assert shown.run("document.querySelectorAll('.note').length") == 0


def test_a_plots_hover_shows_the_numbers(shown, recorded_run):
    draw_all(shown)
    shown.run("document.getElementById('smooth').click()")
    shown.run("document.querySelector('[data-plot=entropy]').scrollIntoView({block: 'center'})")
    box = json.loads(
        shown.run(
            "JSON.stringify(document.querySelector('[data-plot=entropy] .xy .plot, [data-plot=entropy] .plotbg, "
            "[data-plot=entropy] .nsewdrag').getBoundingClientRect())"
        )
    )
    shown.move_to(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    text = shown.wait(
        "[...document.querySelectorAll('[data-plot=entropy] .hoverlayer text')].map(t => t.textContent).join(' ')"
    )
    last = read(recorded_run / "metrics.jsonl")[-1]
    for name in ("student", "teacher"):
        number = float(re.search(rf"{name} ?:? ?([\d.]+)", text)[1])
        assert number == pytest.approx(last[f"{name}_entropy"], rel=1e-3)


def enter(browser, selector, value):
    """Type into an input, or choose of a select."""
    browser.run(
        f"(box => {{ box.value = {json.dumps(value)}; box.dispatchEvent(new Event('input')); "
        f"box.dispatchEvent(new Event('change')) }})(document.querySelector({json.dumps(selector)}))"
    )


def first_own_token(recorded_run):
    """Return the newest step's first sample and the place of its first visible token that the student wrote."""
    samples = read(recorded_run / "samples.jsonl")
    sample = next(s for s in samples if s["step"] == samples[-1]["step"])
    return sample, next(
        i for i, token in enumerate(sample["tokens"]) if token["kind"] != "guidance" and token["text"].strip()
    )


def test_a_tokens_hover_shows_its_numbers_and_the_teachers_alternatives(shown, recorded_run):
    sample, place = first_own_token(recorded_run)
    token = sample["tokens"][place]
    find = f"document.querySelectorAll('#responses .response')[0].querySelector('[data-i=\"{place}\"]')"
    assert shown.run("document.getElementById('tip').hidden")
    for _ in range(100):  # the page may still be growing above the token and move it away from the pointer
        shown.run(f"{find}.scrollIntoView({{block: 'center'}})")
        box = json.loads(shown.run(f"JSON.stringify({find}.getClientRects()[0])"))
        shown.move_to(1, 1)  # a token that the pointer is on already is not entered again after scrolling
        shown.move_to(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        if shown.run("!document.getElementById('tip').hidden"):
            break
        time.sleep(0.2)
    assert shown.run("!document.getElementById('tip').hidden")
    text = shown.run("document.getElementById('tip').innerText")
    for name in ("student", "teacher"):
        number = float(re.search(rf"{name}'s log-probability\s+(-?[\d.]+)", text)[1])
        assert number == pytest.approx(token[f"{name}_logprob"], abs=1e-3)
    assert float(re.search(r"ρ\s+([\d.e-]+)", text)[1]) == pytest.approx(token["rho"], rel=0.02)
    assert re.search(r"trusted|outlier", text)[0] == {"trust": "trusted", "outlier": "outlier"}[token["kind"]]
    first = text[text.index("Teacher's most probable tokens") :]
    shares = [float(share) for share in re.findall(r"([\d.]+(?:e-\d+)?)%", first)]
    likely = [math.exp(value) for _, value in token["alternatives"] if value >= -6.9]
    assert shares == pytest.approx([100 * p for p in likely], rel=0.02)
    kinds = shown.run("[...document.querySelectorAll('#responses .response')][0].querySelectorAll('.tok').length")
    assert kinds == len(sample["tokens"])


def test_the_search_finds_a_token_of_any_step(shown, recorded_run):
    samples = read(recorded_run / "samples.jsonl")
    words = {token["text"].strip() for token in samples[0]["tokens"]}
    word = max(words, key=len)
    texts = ["".join(t["text"] for t in s["tokens"]) + "\0" + s["prompt"] for s in samples]
    holders = [text for text in texts if word.lower() in text.lower()]
    enter(shown, "#search", word)
    assert shown.run("document.querySelectorAll('#responses .sample').length") == min(20, len(holders))
    assert f"{len(holders)} of {len(samples)} responses" in shown.run("document.getElementById('responses').innerText")
    hit = shown.run("[...document.querySelectorAll('#responses .tok.hit')].map(t => t.textContent).join('')")
    assert word.lower() in hit.lower().replace("↵", "")
    enter(shown, "#search", "no such token")
    assert shown.run("document.querySelectorAll('#responses .sample').length") == 0


def test_steps_are_chosen_and_survive_a_reload(shown, page, recorded_run):
    assert "Step 4" in shown.run("document.querySelector('#responses .sample').innerText")
    shown.run("document.querySelector('[aria-label=\"Step before\"]').click()")
    assert "Step 3" in shown.run("document.querySelector('#responses .sample').innerText")
    shown.run("document.querySelector('[value=tokens]').click()")
    shown.open(page)
    assert "Step 3" in shown.run("document.querySelector('#responses .sample').innerText")
    draw_all(shown)
    generated = [record["generated_tokens"] for record in read(recorded_run / "metrics.jsonl")]
    plotted = shown.run("document.querySelector('[data-plot=loss]').data[0].x")
    assert plotted == [sum(generated[: i + 1]) for i in range(4)]


def test_answers_stand_side_by_side_and_are_graded(shown, recorded_run):
    answers = read(recorded_run / "answers.jsonl")
    first = shown.run("document.querySelector('#answers .sample').innerText")
    assert re.search(r"p0\s+expected answer 0", first)
    assert "add <b>0</b> & 0" in first
    before, after = (next(a for a in answers if a["step"] == step and a["id"] == "p0") for step in (0, 4))
    for answer in (before, after):
        assert f"after {answer['step']} steps: {'✓ correct' if answer['correct'] else '✗ wrong'}" in first
    wrong = sum(not a["correct"] and not b["correct"] for a, b in zip(answers[:7], answers[-7:], strict=True))
    enter(shown, '[aria-label="Which problems"]', "still wrong")
    assert f"{wrong} of 7 recorded problems" in shown.run("document.getElementById('answers').innerText")


def test_the_recipe_marks_what_differs_from_the_defaults(shown):
    changed = shown.run("[...document.querySelectorAll('#recipe tr.changed .key')].map(t => t.textContent)")
    assert "training.steps" in changed
    assert "training.optimizer" not in changed


def test_data_never_becomes_markup(browser, recorded_run, tmp_path):
    run = shutil.copytree(recorded_run, tmp_path / "<img src=x onerror=alert(1)>")
    evil = "</script><img src=x onerror='window.hurt=1'><b>bold</b>"
    samples = read(run / "samples.jsonl")
    for sample in samples:
        sample["prompt"] = sample["prompt_id"] = sample["finish_reason"] = evil
        sample["tokens"][-1] |= {"text": evil, "alternatives": [[evil, -0.1]]}
    replaced = dict.fromkeys(("response", "prompt", "answer", "found"), evil)
    answers = [answer | replaced for answer in read(run / "answers.jsonl")]
    for name, records in (("samples", samples), ("answers", answers)):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "recipe.yaml").write_text(json.dumps({"objective": {"name": evil, evil: evil}}))
    (run / "run.json").write_text(json.dumps({"starts": [{"commit": evil, "started": evil, "device": evil}]}))
    browser.errors.clear()
    browser.open(write_report([run, recorded_run], tmp_path / "out"))
    draw_all(browser)
    last = len(samples[-2]["tokens"]) - 1
    find = f"document.querySelector('#responses .response').querySelector('[data-i=\"{last}\"]')"
    browser.run(f"{find}.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))")
    assert evil in browser.run("document.getElementById('tip').innerText")
    assert browser.run("document.querySelectorAll('body img, main b > b, .text b').length") == 0
    assert browser.run("window.hurt === undefined")
    assert evil in browser.run("document.getElementById('answers').innerText")
    assert browser.errors == []


def test_several_runs_are_overlaid_and_tabulated(browser, recorded_run, tmp_path):
    runs = [shutil.copytree(recorded_run, tmp_path / name) for name in ("one", "two", "three")]
    recipe = (runs[1] / "recipe.yaml").read_text()
    (runs[1] / "recipe.yaml").write_text(recipe.replace("lr: 0.01", "lr: 0.02"))
    browser.errors.clear()
    browser.open(write_report(runs, tmp_path / "out"))
    draw_all(browser)
    assert browser.run("document.querySelector('[data-plot=accuracy]').data.map(t => t.name)") == [
        "one",
        "two",
        "three",
    ]
    assert browser.run("document.querySelectorAll('[data-plot=rho]').length") == 3
    table = browser.run("document.querySelector('#differences table').innerText")
    assert re.search(r"training\.lr\s+0\.01\s+0\.02\s+0\.01", table)
    assert "training.steps" not in table
    assert browser.errors == []


def test_a_run_without_some_records_says_what_is_missing(browser, recorded_run, tmp_path):
    run = tmp_path / "bare"
    run.mkdir()
    records = [{"step": r["step"], "loss": r["loss"]} for r in read(recorded_run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    browser.errors.clear()
    browser.open(write_report(run))
    assert "Not recorded: only with evaluation.problems in the recipe." in browser.run("document.body.innerText")
    notes = browser.run("document.getElementById('notes').innerText")
    assert "recipe.yaml is missing" in notes
    assert "no responses (logging.samples)" in notes
    browser.run("document.querySelector('[data-plot=loss]').scrollIntoView()")
    browser.wait(f"({DRAWN}).includes('loss')")
    assert browser.errors == []


def test_a_watched_page_takes_up_new_steps_and_keeps_what_the_reader_typed(browser, recorded_run, tmp_path):
    run = shutil.copytree(recorded_run, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:2]))
    browser.errors.clear()
    browser.open(write_report(run, refresh=2))
    # The page may load itself again between any two calls, so each waits for what it needs.
    browser.wait("/reloads every 2 s[^]*After 2 steps/.test(document.body?.innerText)")
    box = "document.documentElement?.dataset.ready && document.getElementById('search')"
    browser.wait(f"(box => box && (box.value = 'add', box.dispatchEvent(new Event('input'))))({box})")
    (run / "metrics.jsonl").write_text("".join(lines))
    write_report(run)
    browser.wait("document.documentElement?.dataset.ready && /After 4 steps/.test(document.body.innerText)")
    assert browser.run("document.getElementById('search').value") == "add"
    assert browser.errors == []


def test_a_run_can_be_hidden(browser, recorded_run, tmp_path):
    runs = [shutil.copytree(recorded_run, tmp_path / name) for name in ("one", "two")]
    browser.open(write_report(runs, tmp_path / "out"))
    draw_all(browser)
    names = "document.querySelector('[data-plot=accuracy]').data.map(t => [t.name, t.line.color])"
    before = browser.run(names)
    browser.run("document.querySelector('nav .legend input').click()")
    assert browser.run(names) == before[1:]  # the other one keeps its colour


def test_it_prints_in_light_colours_with_every_plot(shown, tmp_path):
    shown.emulate(prefers_color_scheme="dark")
    draw_all(shown)
    dark = shown.run("document.querySelector('[data-plot=loss]').layout.font.color")
    shown.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").stat().st_size > 50_000
    shown.run("dispatchEvent(new Event('beforeprint'))")
    assert shown.run("document.querySelector('[data-plot=loss]').layout.font.color") == "#1b1f24" != dark
    shown.emulate(prefers_color_scheme="light")
