"""The report of `megatron-tropd data`: how files were read, three prompts as the model receives them, and problems.

print(describe(prompts, tokenizer, limit="128 tokens (data.max_prompt_tokens)", colours=sys.stdout.isatty()))
"""

from __future__ import annotations

import re

from megatron_tropd.prompts.data_report import columns_by_role, unread_columns, warnings_about
from megatron_tropd.prompts.prompt_set import PromptSet
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt

_SHOWN = 3
_SHOWN_CHARACTERS = 1500  # of a prompt: two thirds from its beginning, the rest from its end
_SAMPLE = 5_000  # rows whose lengths are measured
_SPECIAL = ("\033[1;36m", "\033[0m")  # bold cyan around special tokens, on a terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could move the cursor of a terminal; \n and \t stay


def describe(prompts: PromptSet, tokenizer: Tokenizer | None, limit: str, colours: bool = False) -> str:
    """Return the whole report as text.

    Args:
        prompts: opened with `tokenizer`.
        tokenizer: renders prompts; None: their messages are shown.
        limit: the longest prompt and where that is from; "" where none is known.
        colours: mark special tokens by colour.
    """
    sample = list(prompts.sample(_SAMPLE))
    lines = _files(prompts)
    step = max(1, len(sample) // _SHOWN)
    for prompt in sample[::step][:_SHOWN]:
        lines += ["", _heading(prompt, tokenizer), *_rendered(prompt, tokenizer, colours)]
    lines += ["", *_totals(prompts, sample, tokenizer, limit), *_problems(prompts)]
    return "\n".join(lines)


def _files(prompts: PromptSet) -> list[str]:
    lines = []
    for rows, reader in zip(prompts.files, prompts.readers, strict=True):
        layouts = ", ".join(
            f"{name} ({_count(count, 'row')})" if len(reader.layouts) > 1 else name
            for name, count in reader.layouts.most_common()
        )
        lines += [
            f"{rows.path}: {rows.format}, {_count(len(rows), 'row')}",
            f"  layout    {layouts or 'not recognised'}",
            f"  columns   {columns_by_role(reader) or 'none read'}",
        ]
        unread = unread_columns(rows, reader)
        lines += [f"  not read  {', '.join(unread)}"] if unread else []
        lines += [f"  warning   {text}" for text in warnings_about(rows, reader)]
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _heading(prompt: Prompt, tokenizer: Tokenizer | None) -> str:
    parts = [f"{prompt.row}  id {_inline(prompt.id, 40)}"]
    parts += [f"domain {_inline(prompt.domain, 40)}"] if prompt.domain is not None else []
    parts += [_count(len(prompt.tokens), "token")] if tokenizer else []
    parts += [_count(len(prompt.tools), "tool")] if prompt.tools else []
    parts += [f"template arguments {prompt.chat_template_kwargs}"] if prompt.chat_template_kwargs else []
    return ", ".join(parts)


def _inline(text: str, longest: int) -> str:
    shown = _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text.replace("\n", "\u23ce"))
    return shown if len(shown) <= longest else f"{shown[: longest - 1]}\u2026"


def _rendered(prompt: Prompt, tokenizer: Tokenizer | None, colours: bool) -> list[str]:
    marks = _SPECIAL if colours else ("", "")
    if tokenizer is not None:
        text = visible(prompt.tokens, tokenizer, marks)
    elif prompt.messages is not None:
        text = _printable("\n".join(f"[{m['role']}] {m['content'] or m.get('tool_calls')}" for m in prompt.messages))
    else:
        assert prompt.text is not None  # the other kind of prompt
        text = _printable(prompt.text)
    lines = [f"  \u2502 {line}" for line in text.split("\n")]
    if prompt.teacher_response is not None:
        cut = ", which was cut: no EOS follows" if prompt.teacher_finish_reason == "length" else ""
        lines.append(f"  teacher response{cut}: {_inline(prompt.teacher_response, 90)}")
    if prompt.answer is not None:
        lines.append(f"  answer: {_inline(prompt.answer, 90)}")
    return lines


def visible(ids: list[int], tokenizer: Tokenizer, marks: tuple[str, str] = ("", "")) -> str:
    """Return the text of token ids with special tokens written out between `marks`, the middle of a long one cut."""
    pieces = tokenizer.pieces()
    runs: list[str | list[int]] = []  # special tokens, and runs of others between them
    for token in ids:
        last = runs[-1] if runs else ""
        if not tokenizer.decode([token]) and token in pieces:
            runs.append(f"{marks[0]}{pieces[token]}{marks[1]}")
        elif isinstance(last, str):
            runs.append([token])
        else:
            last.append(token)
    parts = [run if isinstance(run, str) else _printable(tokenizer.decode(run)) for run in runs]
    length = sum(map(len, parts))
    if length <= _SHOWN_CHARACTERS:
        return "".join(parts)
    longest = max(range(len(parts)), key=lambda i: len(parts[i]))
    room = max(90, len(parts[longest]) - (length - _SHOWN_CHARACTERS))
    head, tail = 2 * room // 3, room // 3
    left_out = _count(len(parts[longest]) - head - tail, "character")
    parts[longest] = f"{parts[longest][:head]}\n[... {left_out} ...]\n{parts[longest][-tail:]}"
    return "".join(parts)


def _printable(text: str) -> str:
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


def _totals(prompts: PromptSet, sample: list[Prompt], tokenizer: Tokenizer | None, limit: str) -> list[str]:
    rows = sum(map(len, prompts.files))
    repeated = "left out" if prompts.deduplicates else "used; data.deduplicate=true leaves them out"
    lines = [f"usable      {len(prompts):,} of {_count(rows, 'row')}"]
    if prompts.duplicates:
        lines.append(f"duplicates  {_count(prompts.duplicates, 'row')} with the prompt of an earlier one ({repeated})")
    else:
        lines.append("duplicates  none")
    if tokenizer is not None:
        note = "" if len(sample) == rows else f" (of {_count(len(sample), 'row')})"
        lines.append(f"tokens      {_quantiles([len(prompt.tokens) for prompt in sample])}{note}")
        lines.append(
            f"too long    {prompts.too_long:,}; the limit is {limit}" if limit else "too long    no limit is known"
        )
    else:
        lines.append("tokens      not measured: give --tokenizer, or student.hf_path=FOLDER")
    responses = [prompt.teacher_response for prompt in sample if prompt.teacher_response is not None]
    if responses:
        lengths = ""
        if tokenizer is not None:
            lengths = f"; tokens: {_quantiles([len(tokenizer.encode_response(text)) for text in responses])}"
        lines.append(
            f"responses   {_count(prompts.responses, 'row')} with a teacher's, {prompts.cut:,} of them cut{lengths}"
        )
    return lines


def _quantiles(lengths: list[int]) -> str:
    ordered = sorted(lengths)
    if not ordered:
        return "none"
    shares = {"min": 0.0, "50 %": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}
    return ", ".join(f"{name} {ordered[round(share * (len(ordered) - 1))]:,}" for name, share in shares.items())


def _problems(prompts: PromptSet) -> list[str]:
    if not prompts.problems:
        return ["problems    none"]
    return [f"problems    {len(prompts.problems):,}", *(f"  {_inline(line, 400)}" for line in prompts.problems.lines())]
