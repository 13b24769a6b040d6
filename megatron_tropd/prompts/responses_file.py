"""The JSONL file of a model's responses: only records of this program, each with digests of model, prompt and sampling.

A later run completes the file. It keeps every line except what a killed run left incomplete: a truncated last line, and
the responses of a prompt with too few of them. Any other content is refused, never lost.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.errors import UserError
from megatron_tropd.prompts.fingerprint import digest_of
from megatron_tropd.system.json_files import refuse_foreign, refuse_unwritable, write_text
from megatron_tropd.types import Prompt, Sampling

logger = logging.getLogger(__name__)

_BEGINNING = '{"id": '  # of every record, as json.dumps writes it
_FIELDS = ("id", "sample", "finish_reason", "length")
_DIGESTS = {
    "prompt": "other prompts under the same ids",
    "model": "another model, tokenizer, end of text or chat template (with its variables and tokenizer.date)",
    "sampling": "other sampling (temperature, top_k, top_p, stop, max_new_tokens, seed or samples)",
}


@dataclass(frozen=True)
class Origin:
    """What makes a file's responses, beside each prompt."""

    model: str  # digest of weights and tokenizer
    sampling: Sampling

    def digests(self, prompt: Prompt) -> dict[str, str]:
        """Return the digests that a response to `prompt` bears."""
        sampling = {key: value for key, value in asdict(self.sampling).items() if key != "step"}
        content = [prompt.text, prompt.messages, prompt.tools, prompt.chat_template_kwargs]
        return {"prompt": digest_of(content), "model": self.model, "sampling": digest_of(sampling)}


def finished_ids(output: str | Path, prompts: list[Prompt], origin: Origin, field: str) -> set[str]:
    """Return the ids of the prompts with all their responses in `output`; nothing is written.

    Raises:
        UserError: the file holds anything but responses to these prompts, by this model and sampling.
    """
    return _read(Path(output), prompts, origin, field)[0]


def make_folder(output: Path) -> None:
    """Make the folder of a file to write to; UserError where nothing can be written there."""
    folder = Path(os.path.realpath(output)).parent
    refuse_unwritable(folder, f"--output {output}")
    folder.mkdir(parents=True, exist_ok=True)


def prepare_file(output: str | Path, prompts: list[Prompt], origin: Origin, field: str) -> set[str]:
    """Return `finished_ids` after dropping what a killed run left incomplete; every other line stays as it is."""
    output = Path(output)
    make_folder(output)
    finished, kept = _read(output, prompts, origin, field)
    if kept is not None:
        write_text(output, "".join(line + "\n" for line in kept))
    return finished


def append(output: str | Path, records: list[dict[str, Any]]) -> None:
    """Append records; UserError that names the file where there is no room for them."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        with open(output, "ab") as file:  # a lone surrogate is written as JSON's escape of it
            file.write(text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise UserError(
            f"{output} cannot be written ({error.strerror}); make room and give the same command again, which "
            "completes the file."
        ) from error


def _read(output: Path, prompts: list[Prompt], origin: Origin, field: str) -> tuple[set[str], list[str] | None]:
    """Return the finished ids, and the lines to keep where the file must be rewritten (None: as it is)."""
    refuse_foreign(output, lambda _: True, "a model's responses", "--output")
    if not output.exists():
        return set(), None
    try:
        lines = output.read_bytes().decode("utf-8").split("\n")  # splitlines would also split inside of texts
    except UnicodeDecodeError as error:
        raise _foreign(output, f"it is not UTF-8 text (byte {error.start})") from error
    tail = lines.pop()  # empty, unless a killed run left the last line incomplete
    records = [_record(output, number, line, field) for number, line in enumerate(lines, start=1)]
    rewrite = bool(tail)
    if tail and _is_record(_parse(tail), field):
        lines.append(tail)
        records.append(_parse(tail))
    elif tail and not (tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail)):
        raise _foreign(output, f"line {len(lines) + 1} is not a record of this command")
    _compare(output, [record for record in records if record], prompts, origin)
    per_prompt, asked = origin.sampling.samples_per_prompt, {prompt.id for prompt in prompts}
    counts = Counter(record["id"] for record in records if record)
    if any(count > per_prompt for count in counts.values()):
        raise UserError(
            f"{output} holds more than {per_prompt} responses of a prompt: it was written with other --samples, or by "
            "two commands at once. Remove what is too much, move it away, or give another output."
        )
    dropped = {name for name, count in counts.items() if count < per_prompt and name in asked}
    kept = [line for line, record in zip(lines, records, strict=True) if not (record and record["id"] in dropped)]
    return set(counts) - dropped, kept if rewrite or dropped else None


def _record(output: Path, number: int, line: str, field: str) -> dict[str, Any] | None:
    """Return the record of a line, None for a blank one; UserError for any other line."""
    if not line.strip():
        return None
    record = _parse(line)
    if _is_record(record, field):
        return record
    if _is_record(record, None):
        raise UserError(
            f"{output} line {number} has no {field!r}: it was written with another --field. Give that one, or another "
            "output."
        )
    raise _foreign(output, f"line {number} is not a record of this command")


def _is_record(record: Any, field: str | None) -> bool:
    names = _FIELDS if field is None else (*_FIELDS, field)
    return isinstance(record, dict) and all(name in record for name in names) and isinstance(record["id"], str)


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _foreign(output: Path, why: str) -> UserError:
    return UserError(
        f"--output {output} exists and holds more than a model's responses ({why}): it is left as it is. Give another "
        "output, or fix or move the file."
    )


def _compare(output: Path, records: list[dict[str, Any]], prompts: list[Prompt], origin: Origin) -> None:
    """Refuse responses that this command would not have written."""
    by_id = {prompt.id: origin.digests(prompt) for prompt in prompts}
    ours = origin.digests(Prompt(id=""))
    unmarked = []
    for record in records:
        digests = record.get("digests")
        if not isinstance(digests, dict):
            unmarked.append(record)
            continue
        expected = by_id.get(record["id"], {key: ours[key] for key in ("model", "sampling")})
        differing = [what for key, what in _DIGESTS.items() if key in expected and digests.get(key) != expected[key]]
        if differing:
            raise UserError(
                f"{output} holds responses, such as that to id {record['id']!r}, that come from "
                f"{' and '.join(differing)} than asked for now. Give another output, or restore what differs to "
                "complete this file."
            )
    if unmarked:
        _accept_unmarked(output, unmarked, by_id)


def _accept_unmarked(output: Path, records: list[dict[str, Any]], by_id: dict[str, Any]) -> None:
    """Accept records of earlier versions, which cost GPU hours and bear no digests, where the ids leave no doubt."""
    doubtful = [record["id"] for record in records if record["id"] not in by_id or record["id"].isdecimal()]
    if doubtful:
        raise UserError(
            f"{output} holds {len(records)} responses of an earlier version, which do not record their prompts, and "
            f"the id {doubtful[0]!r} leaves open whether it is one of these prompts (ids that are line numbers fit any "
            "file). Give another output; give the prompts ids to complete such a file."
        )
    logger.warning(
        "%s holds %d responses of an earlier version without digests: they are taken to come from this model, these "
        "prompts and this sampling",
        output,
        len(records),
    )
