"""Responses in a report: samples with their tokens, and graded answers, in a compact form that fits on a page.

Numbers become whole thousandths of a nat, and every distinct text is stored once. A file too large for the page is
thinned over the steps, except for the first and the last step, with a note on the page.

    pack_samples(folder / "samples.jsonl", notes)      # {"texts": [...], "samples": [...]}, read by report_texts.js
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_tropd.reporting.run_records import note_damage, parse_line, read_lines

MAX_BYTES = 30_000_000  # of samples.jsonl that are read: what a page of 8 MB and 20 s can take
MAX_TOKENS = 2_000  # of a response
MAX_PROMPT = 4_000  # characters
MAX_ANSWER = 3_000  # characters
MAX_PROBLEMS = 64
MAX_EVALUATIONS = 12
_LEAST_LOGPROB = -6.9  # alternatives of less than a thousandth are left out
_STEP = re.compile(rb'\{"step": (\d+)')
_KINDS = {"trust": 0, "outlier": 1, "guidance": 2, "dropped": 3}


class _Texts:
    """Distinct texts, each with its place."""

    def __init__(self) -> None:
        self.places: dict[str, int] = {}

    def place(self, text: Any) -> int:
        return self.places.setdefault(str(text), len(self.places))


def pack_samples(path: Path, notes: list[str], max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """Return the samples of a run as columns, and the texts that they name by place.

    Args:
        path: samples.jsonl; it may be missing.
        notes: gets a line about what was left out.
        max_bytes: about so much of the file is read.
    """
    texts = _Texts()
    samples, cut = [], 0
    for record in _chosen_records(path, notes, max_bytes):
        tokens = record.get("tokens")
        if isinstance(tokens, list):
            shown = [token for token in tokens[:MAX_TOKENS] if isinstance(token, dict)]
            samples.append(_pack_sample(record, shown, texts))
            cut += len(tokens) > MAX_TOKENS
    if cut:
        notes.append(f"samples.jsonl: long responses ({cut:,}) are shown up to their first {MAX_TOKENS:,} tokens.")
    if samples and not any("a" in sample for sample in samples):
        notes.append("No alternatives of the teacher: this objective reads none of its most probable tokens.")
    samples.sort(key=lambda sample: sample["step"])
    return {"texts": list(texts.places), "samples": samples}


def _chosen_records(path: Path, notes: list[str], max_bytes: int) -> list[dict[str, Any]]:
    """Read the lines of all steps, or of evenly spaced ones where the file is large."""
    if not path.is_file() or not path.stat().st_size:
        notes.append("samples.jsonl is missing or empty: no responses (logging.samples).")
        return []
    chosen = _chosen_steps(path, max_bytes) if path.stat().st_size > max_bytes else None
    if chosen is not None:
        notes.append(f"samples.jsonl is large: responses of {len(chosen):,} of its steps are shown.")
    records, damaged = [], []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            match = _STEP.match(line)
            if chosen is not None and match and int(match[1]) not in chosen:
                continue
            record = parse_line(line)
            if record is not None and isinstance(record.get("step"), int):
                records.append(record)
            elif line.endswith(b"\n") and line.strip():  # else training is writing it
                damaged.append(number)
    note_damage(path.name, damaged, notes)
    return records


def _chosen_steps(path: Path, max_bytes: int) -> set[int]:
    with open(path, "rb") as file:
        steps = sorted({int(match[1]) for line in file if (match := _STEP.match(line))})
    count = max(2, len(steps) * max_bytes // path.stat().st_size)
    return set(spaced(steps, count))


def spaced(values: list[int], count: int) -> list[int]:
    """Return `count` of the values at even distances, the first and the last among them; all where they are fewer."""
    if len(values) <= count:
        return values
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _pack_sample(record: dict[str, Any], tokens: list[dict[str, Any]], texts: _Texts) -> dict[str, Any]:
    packed = {
        "step": record["step"],
        "id": record.get("sample_id"),
        "prompt_id": record.get("prompt_id"),
        "prompt": texts.place(_cut(record.get("prompt", ""), MAX_PROMPT)),
        "finish": record.get("finish_reason"),
        "t": [texts.place(token.get("text", "")) for token in tokens],
        "k": "".join(str(_KINDS.get(token.get("kind") or "", 2)) for token in tokens),
        "s": [_thousandths(token.get("student_logprob")) for token in tokens],
        "l": [_thousandths(token.get("teacher_logprob")) for token in tokens],
    }
    alternatives = [_pack_alternatives(token.get("alternatives") or [], texts) for token in tokens]
    return packed | ({"a": alternatives} if any(alternatives) else {})


def _pack_alternatives(alternatives: list[Any], texts: _Texts) -> list[int | None] | int:
    """Return text, log-prob, text, log-prob, ...; 0 for none."""
    likely = [(text, value) for text, value in alternatives if value is not None and value >= _LEAST_LOGPROB]
    return [x for text, value in likely for x in (texts.place(text), _thousandths(value))] or 0


def _thousandths(value: float | None) -> int | None:
    return None if value is None else round(1000 * value)


def _cut(text: Any, length: int) -> str:
    text = str(text)
    return text if len(text) <= length else f"{text[:length]}… ({len(text) - length:,} more characters)"


def pack_answers(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the graded answers of a run: the evaluations' steps, and each problem's answers by step."""
    records = [record for record in read_lines(path, notes) if isinstance(record.get("step"), int)]
    every = sorted({record["step"] for record in records})
    steps = spaced(every, MAX_EVALUATIONS)
    if len(steps) < len(every):
        notes.append(f"answers.jsonl: answers of {len(steps)} of {len(every)} evaluations are shown.")
    asked_ids = list(dict.fromkeys(str(record.get("id")) for record in records))
    if len(asked_ids) > MAX_PROBLEMS:
        notes.append(f"answers.jsonl: answers to the first {MAX_PROBLEMS} of {len(asked_ids)} problems are shown.")
    chosen = set(asked_ids[:MAX_PROBLEMS])
    problems: dict[str, dict[str, Any]] = {}
    for record in records:
        if record["step"] not in steps or str(record.get("id")) not in chosen:
            continue
        asked: dict[str, Any] = {
            "id": record.get("id"),
            "prompt": _cut(record.get("prompt", ""), MAX_PROMPT),
            "by_step": {},
        }
        problem = problems.setdefault(str(record.get("id")), asked | {"answer": record.get("answer")})
        problem["by_step"][record["step"]] = {
            "response": _cut(record.get("response", ""), MAX_ANSWER),
            "found": record.get("found"),
            "correct": record.get("correct"),
            "finish": record.get("finish_reason"),
            "length": record.get("length"),
        }
    return {"steps": steps, "problems": list(problems.values())}
