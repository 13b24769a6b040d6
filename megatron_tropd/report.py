"""A run's records as one self-contained HTML page; several runs are laid over each other.

Reads metrics.jsonl, evaluations.jsonl, summary.json and recipe.yaml of each run folder, whatever of them there is. It
computes nothing that training did not record, but running means (plots.py).

    write_report(["runs/tropd", "runs/opd"], "runs/comparison")  # -> runs/comparison/report.html and plots/*.png
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.errors import UserError
from megatron_tropd.json_files import refuse_foreign, write_bytes, write_text
from megatron_tropd.metrics import read_records
from megatron_tropd.plots import RunRecords, draw, plot_accuracy

__all__ = ["plot_accuracy", "read_run", "write_report"]


def read_run(folder: str | Path) -> RunRecords:
    """Read a run's folder; UserError if it holds no metrics.jsonl."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{folder} holds no metrics.jsonl; give the folder of a run (the recipe's logging.dir).")
    evaluations, summary, recipe = (folder / n for n in ("evaluations.jsonl", "summary.json", "recipe.yaml"))
    return RunRecords(
        name=folder.name or str(folder.resolve().name),
        metrics=read_records(path),
        evaluations=read_records(evaluations) if evaluations.is_file() else [],
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
    )


def write_report(folders: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write `output`/report.html and `output`/plots/*.png; return the page's path.

    `output` defaults to the run's folder, or, for several runs, to `comparison` beside the first.
    """
    folders = [folders] if isinstance(folders, str | Path) else list(folders)
    runs = [read_run(folder) for folder in folders]
    if len({run.name for run in runs}) < len(runs):
        for run, folder in zip(runs, folders, strict=True):
            run.name = str(folder)
    beside = Path(folders[0]) if len(runs) == 1 else Path(folders[0]).parent / "comparison"
    output = Path(output) if output else beside
    page, images = output / "report.html", {}
    refuse_foreign(page, _is_report, "a report", "--output holds")
    for name, title, figure in draw(runs):
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=120, metadata={"Software": _MARK})
        path = output / "plots" / f"{name}.png"
        refuse_foreign(path, _is_picture, "a report's picture", "--output holds")
        images[path] = (title, data.getvalue())
    for path, (_, data) in images.items():  # after all of them were looked at: nothing is written where one refuses
        write_bytes(path, data)
    write_text(page, _page(runs, [(title, base64.b64encode(data).decode()) for title, data in images.values()]))
    return page


def _is_report(page: Path) -> bool:
    """Whether a page is one that this module, or an earlier version of it, wrote."""
    text = page.read_text(encoding="utf-8")
    return text.startswith("<!doctype html><html") and "<h2>Settings</h2>" in text and "<th>run</th>" in text


def _is_picture(path: Path) -> bool:
    """Whether a picture is a report's: it bears our mark, or an earlier version's report lies beside it."""
    head = path.read_bytes()[:1024]
    if _MARK.encode() in head:
        return True
    page = path.parent.parent / "report.html"
    return b"Matplotlib" in head and page.is_file() and _is_report(page)


_MARK = "megatron-tropd report"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1340px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .9rem; border-bottom: 1px solid #ddd }
td { text-align: right; font-variant-numeric: tabular-nums } th:first-child, td:first-child { text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem } img { width: 100% }
pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""


def _page(runs: list[RunRecords], pictures: list[tuple[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(run.name)}</td>" + "".join(f"<td>{cell}</td>" for cell in _cells(run)) + "</tr>"
        for run in runs
    )
    heads = "".join(f"<th>{head}</th>" for head in ("run", *_HEADS))
    images = "".join(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">' for title, data in pictures)
    recipes = "".join(
        f"<details><summary>Recipe of {html.escape(run.name)}</summary><pre>{html.escape(run.recipe)}</pre></details>"
        for run in runs
        if run.recipe
    )
    title = " · ".join(html.escape(run.name) for run in runs)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><table><tr>{heads}</tr>{rows}</table>"
        f'<div class="plots">{images}</div><h2>Settings</h2>{recipes}</body></html>\n'
    )


_HEADS = ("steps", "loss, first → last", "trusted, first → last", "accuracy, first → last", "tokens/s", "seconds")


def _cells(run: RunRecords) -> list[str]:
    rate = run.column("metrics", "tokens_per_second")[1]
    seconds = run.summary.get("seconds")
    return [
        str(run.metrics[-1]["step"] + 1 if run.metrics else 0),
        _first_last(run.column("metrics", "loss")[1]),
        _first_last(run.column("metrics", "trust_fraction")[1]),
        _first_last(run.column("evaluations", "accuracy")[1]),
        f"{sum(rate) / len(rate):.0f}" if rate else "",
        f"{seconds:.0f}" if seconds is not None else "",
    ]


def _first_last(values: list[float]) -> str:
    return f"{values[0]:.4g} → {values[-1]:.4g}" if values else ""
