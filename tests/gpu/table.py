"""The summary as Markdown that reads well in a terminal, too."""

from __future__ import annotations

from typing import Any


def as_markdown(summary: dict[str, Any]) -> str:
    """Return the whole report: what ran where, how each stage ended, then each stage's figures."""
    versions = ", ".join(f"{name} {version or '–'}" for name, version in summary["versions"].items())
    memory = f", {summary['memory_gb']:.1f} GB" if summary["memory_gb"] else ""
    cuda = f", CUDA {summary['cuda']}" if summary["cuda"] else ""
    lines = ["# Figures of one device", "", f"`{summary['command']}`", ""]
    lines += [f"{summary['name']} ({summary['device']}{memory}{cuda}); {versions}; commit {summary['commit'] or '–'}"]
    lines += [f"{summary['date']}; {summary['seconds']:.0f} s in all{'; small sizes' if summary['small'] else ''}", ""]
    rows = [[s["stage"], s["status"], s["seconds"], s["limit"], s["reason"]] for s in summary["stages"]]
    lines += _table(["stage", "status", "seconds", "limit", "reason"], rows)
    for stage in summary["stages"]:
        lines += _section(stage)
    return "\n".join(lines) + "\n"


def _section(stage: dict[str, Any]) -> list[str]:
    lines = ["", f"## {stage['stage']}"]
    for table in stage["figures"].get("tables", []):
        lines += ["", table["title"], "", *_table(table["columns"], table["rows"])]
    lines += [line for note in stage["figures"].get("notes", []) for line in ("", note)]
    if stage["status"] != "passed":
        lines += ["", f"{stage['status']}: {stage['reason']}"]
    if stage["log_tail"]:
        lines += ["", "```", *stage["log_tail"], "```"]
    return lines


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [columns, *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
