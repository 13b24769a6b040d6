"""The lines in which a run logs how data files were read: formats, layouts, columns and skipped rows."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from megatron_tropd.data.columns import KNOWN
from megatron_tropd.data.files import Rows
from megatron_tropd.data.layouts import RowReader
from megatron_tropd.prompts.prompt_set import PromptSet

_OWN_WORDS = sorted(KNOWN - {"input", "output", "context", "query"})  # short common words resemble too much
_MATERIAL = {"context", "passage", "article", "document"}  # that questions are about


def understood(prompts: PromptSet) -> Iterator[str]:
    """Yield one line per file: format, rows, layout, columns by role, what is not read; and one of what is left out."""
    for rows, reader in zip(prompts.files, prompts.readers, strict=True):
        layouts = ", ".join(name for name, _ in reader.layouts.most_common())
        read_as = f"{layouts or 'nothing'}: {columns_by_role(reader)}"
        yield f"{rows.path}: {len(rows)} rows of {rows.format}, read as {read_as}"
        unread = unread_columns(rows, reader)
        if unread:
            yield f"{rows.path}: not read: {', '.join(unread)}"
        yield from (f"{rows.path}: warning: {text}" for text in warnings_about(rows, reader))
    counts = []
    if prompts.too_long and not prompts.problems.too_long:
        counts.append(f"{prompts.too_long} rows are skipped as too long (data.skip_long_prompts)")
    if prompts.duplicates:
        word = "left out" if prompts.deduplicates else "kept (data.deduplicate=true leaves them out)"
        counts.append(f"{prompts.duplicates} rows repeat an earlier prompt and are {word}")
    if counts:
        yield f"{prompts.key}: {len(prompts)} prompts are used; {'; '.join(counts)}"


def columns_by_role(reader: RowReader) -> str:
    """Return "prompt <- question, answer <- answer"."""
    return ", ".join(f"{role} <- {' + '.join(names)}" for role, names in reader.sources.items())


def warnings_about(rows: Rows, reader: RowReader) -> Iterator[str]:
    """Yield what may be a mistake: columns whose names resemble ours, roles that few chat templates know."""
    for name in unread_columns(rows, reader):
        near = _near_miss(name, reader)
        if near:
            yield f"the column {name} is not read; was {near} meant? Rename it"
    for name in unread_columns(rows, reader):
        if name.lower() in _MATERIAL and reader.sources.get("prompt"):
            yield f"the column {name} is no part of the prompt; if the question is about it, write both into one column"
    if reader.not_taught:
        yield f"{reader.not_taught} responses are not used: label=false, or weight=0 on the assistant's last turn"
    if reader.roles:
        shown = ", ".join(f"{role} ({count})" for role, count in reader.roles.most_common(5))
        yield f"messages have roles that few chat templates know: {shown}"


def unread_columns(rows: Rows, reader: RowReader) -> list[str]:
    """Return the columns that no role came from, in order."""
    read = {name.split(".")[0] for names in reader.sources.values() for name in _column_names(names)}
    read |= {name for names in reader.sources.values() for name in names}
    return [name for name in (rows.columns or reader.fields) if name not in read]


def _column_names(names: list[str]) -> Iterator[str]:
    for name in names:
        yield name
        yield name.removeprefix("the last turn of ")
        yield name.split("'s ")[0]


def _near_miss(name: str, reader: RowReader) -> str | None:
    """Return the field that a column's name is a slip of the pen away from, unless that field is there."""
    lower = name.strip().lower()
    if name in KNOWN or lower in KNOWN:
        return None
    near = difflib.get_close_matches(lower, _OWN_WORDS, n=1, cutoff=0.87)
    return near[0] if near and near[0] not in reader.fields else None
