"""Runs' records as one self-contained, interactive HTML page; several runs are overlaid and compared.

It computes nothing that training did not record. The page holds plotly's script and all data, compressed, so it opens
from disk without a network. What it shows: plots.py (plots), head.py (result and facts), recipe_view.py (settings),
texts.py (responses); how: report_page.html, .css and report_*.js.

    write_report(["runs/tropd", "runs/opd"], "runs/comparison")  # -> runs/comparison/report.html
"""

from __future__ import annotations

import base64
import gzip
import html
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.reporting.head import columns, facts, sentence
from megatron_tropd.reporting.plots import catalogue, keys_of
from megatron_tropd.reporting.recipe_view import differences, settings
from megatron_tropd.reporting.run_records import RunRecords, read_run
from megatron_tropd.reporting.texts import MAX_BYTES, pack_answers, pack_samples
from megatron_tropd.system.json_files import refuse_foreign, refuse_unwritable, write_text

MAX_POINTS = 2000  # of a line; of more steps every n-th is shown
_NAMES_OF_ANY_RUN = {"train", "training", "distill", "run", "output", "default"}
_SCRIPTS = ("report_plots.js", "report_texts.js", "report_page.js")
_MARK = '<p class="kind">Distillation report'  # of report_page.html, by which a page is known to be ours
_SOURCES = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "answers.jsonl", "summary.json", "run.json")


def write_report(
    folders: str | Path | Sequence[str | Path], output: str | Path | None = None, refresh: float | None = None
) -> Path:
    """Write `output`/report.html and return its path.

    Args:
        folders: run folders.
        output: folder to write to; default: the run's own, or, for several runs, `comparison` beside the first.
        refresh: seconds after which an open page loads itself again; None: never.

    Raises:
        UserError: a folder is no run's, the output cannot be written or is a page of another origin, or plotly is not
            installed.
    """
    paths = [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
    runs = [read_run(path) for path in paths]
    _name_apart(runs)
    beside = paths[0] if len(runs) == 1 else paths[0].resolve().parent / "comparison"
    page = Path(output or beside) / "report.html"
    refuse_unwritable(page.parent, f"--output {page.parent}")
    refuse_foreign(page, _is_report, "a report", "--output holds")
    write_text(page, _page(runs, refresh))  # a browser never meets half a page
    return page


def _is_report(page: Path) -> bool:
    """Whether a page is one that this module, or an earlier version of it, wrote."""
    text = page.read_text(encoding="utf-8")
    if not text.startswith("<!doctype html>"):
        return False
    return _MARK in text or ("<h2>Settings</h2>" in text and "<th>run</th>" in text)


def watch(
    folders: Sequence[str | Path],
    output: str | Path | None = None,
    interval: float = 20.0,
    written: Callable[[Path], Any] = print,
) -> Path:
    """Write the report again whenever the runs' files change, until all runs have finished.

    Args:
        folders: run folders.
        output: see `write_report`.
        interval: seconds between two looks.
        written: called with the page's path after the first time.
    """
    paths, seen = [Path(folder) for folder in folders], None
    page: Path | None = None
    while True:
        state = [_state(path / name) for path in paths for name in _SOURCES]
        finished = all(read_run(path).finished for path in paths) if state != seen else False
        if state != seen:
            first, page = page is None, write_report(paths, output, None if finished else interval)
            seen = state
            if first:
                written(page)
        if finished:
            assert page is not None  # it was written when the state was first seen
            return page
        time.sleep(interval)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        return path.stat().st_size, path.stat().st_mtime_ns
    except OSError:
        return None


def _name_apart(runs: list[RunRecords]) -> None:
    """Name runs by the part of their path that tells them apart; by two parts where the last says nothing."""
    for run in runs:
        others = [other.folder.resolve().parts for other in runs if other is not run]
        parts = run.folder.resolve().parts
        length = 2 if parts[-1] in _NAMES_OF_ANY_RUN else 1
        while length < len(parts) and any(parts[-length:] == other[-length:] for other in others):
            length += 1
        run.name = "/".join(parts[-length:])


def _page(runs: list[RunRecords], refresh: float | None) -> str:
    texts = [_texts(run, MAX_BYTES // len(runs)) for run in runs]  # first: it adds to the runs' notes
    data = {
        "plots": catalogue(),
        "runs": [_describe(run) for run in runs],
        "differences": differences(runs) if len(runs) > 1 else [],
        "refresh": refresh,
    }
    values = {
        "title": html.escape(" · ".join(run.name for run in runs)),
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z"),
        "sentences": "".join(_sentence(run, len(runs) > 1) for run in runs),
        "style": _asset("report_page.css"),
        "script": "\n".join(map(_asset, _SCRIPTS)),
        "data": _pack(json.dumps(data, allow_nan=False).encode()),
        "texts": _pack(json.dumps(texts, allow_nan=False).encode()),
        "plotly": _plotly(),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], _asset("report_page.html"))


def _sentence(run: RunRecords, named: bool) -> str:
    name = f"<b>{html.escape(run.name)}.</b> " if named else ""
    return f'<p class="result">{name}{html.escape(sentence(run))}</p>'


def _texts(run: RunRecords, max_bytes: int) -> dict[str, Any]:
    return {
        "samples": pack_samples(run.folder / "samples.jsonl", run.notes, max_bytes),
        "answers": pack_answers(run.folder / "answers.jsonl", run.notes),
    }


def _describe(run: RunRecords) -> dict[str, Any]:
    """Return the run as report_page.js reads it."""
    stride = max(1, math.ceil(len(run.metrics) / MAX_POINTS))
    if stride > 1:
        run.notes.append(f"Plots show one of {stride} steps ({len(run.metrics):,} in all).")
    generated, total = {}, 0.0
    for record in run.metrics:  # an evaluation after n steps has seen the tokens of all of them
        total += record.get("generated_tokens") or 0
        generated[record["step"] + 1] = total
    steps = [record["step"] + 1 for record in run.metrics]
    evaluated = [record["step"] for record in run.evaluations]
    return {
        "name": run.name,
        "facts": facts(run),
        "columns": columns(run),
        "settings": settings(run),
        "notes": run.notes,
        "metrics": {
            "x": steps[::stride],
            "tokens": [generated[step] for step in steps][::stride] if total else None,
            **{key: _short(values[::stride]) for key, values in _columns(run, "metrics").items()},
        },
        "evaluations": {
            "x": evaluated,
            "tokens": [generated.get(step, 0.0) for step in evaluated] if total else None,
            **{key: _short(values) for key, values in _columns(run, "evaluations").items()},
        },
    }


def _columns(run: RunRecords, source: str) -> dict[str, list[Any]]:
    """Return the columns that the plots read and the run recorded."""
    found: dict[str, list[Any]] = {}
    for key in sorted(keys_of(source)):
        if key.endswith("_histogram"):
            values = [record.get(key) for record in getattr(run, source)]
            values = [value if isinstance(value, list) else None for value in values]
        else:
            values = run.column(source, key)
        if any(value is not None for value in values):
            found[key] = values
    return found


def _short(values: list[Any]) -> list[Any]:
    """Round to five digits, which is more than a plot shows."""
    return [float(f"{value:.5g}") if isinstance(value, float) else value for value in values]


def _pack(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def _asset(name: str) -> str:
    return resources.files("megatron_tropd.reporting").joinpath(name).read_text(encoding="utf-8")


@cache
def _plotly() -> str:
    """Return plotly's script, packed; the package is only looked into, since to import it takes a second."""
    spec = importlib.util.find_spec("plotly")
    script = Path(spec.origin).parent / "package_data" / "plotly.min.js" if spec and spec.origin else None
    if script is None or not script.is_file():
        raise UserError("the report needs plotly, which is not installed: pip install 'plotly>=5.20'")
    return _pack(script.read_bytes())
