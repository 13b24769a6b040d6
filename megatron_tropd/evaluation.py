"""Verifiable answers: find the answer in a response, compare it with the known one, and measure a model's accuracy.

An answer is the last `\\boxed{...}`, else what follows the last `####`, else the last number. Numbers are compared as
exact fractions, other answers as normalised text; it does not do algebra (`x + 1` and `1 + x` differ).

    result = evaluate(engine, problems, recipe.evaluation, groups)
    result["accuracy"]
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import EvaluationConfig
from megatron_tropd.errors import UserError
from megatron_tropd.prompts import PromptEncoder, load_prompts
from megatron_tropd.types import Prompt, Sampling

if TYPE_CHECKING:
    from megatron_tropd.parallel import ParallelGroups
    from megatron_tropd.rollout import RolloutEngine

_NUMBER = re.compile(r"(?:(?<![\w).])-)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|(?<![\w.])-?\.\d+")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}")


def load_problems(path: str | Path, tokenizer: PromptEncoder, max_tokens: int | None = None) -> list[Prompt]:
    """Read a prompt file whose every line has an `answer`; see prompts.load_prompts."""
    return load_prompts(path, tokenizer, max_tokens, require=("answer",))


def extract_answer(response: str, pattern: str = "auto") -> str | None:
    """Return the response's final answer, or None if there is none.

    `pattern` other than "auto" is a regular expression: the last match's first group (or whole match) is the answer.
    Raises UserError if it does not compile.
    """
    if pattern != "auto":
        try:
            match = _last(re.finditer(pattern, response))
        except re.error as error:
            raise UserError(
                f"evaluation.answer_pattern={pattern!r} is not a regular expression ({error}); mend it, or use auto."
            ) from error
        return None if match is None else match[1 if match.re.groups else 0].strip()
    boxed = _last_boxed(response)
    if boxed is not None:
        return boxed
    marked = _last(re.finditer(r"####[ \t]*(\S[^\n]*)", response))
    if marked:
        return marked[1].strip()
    number = _last(_NUMBER.finditer(response))
    return number[0] if number else None


def _last(matches: Any) -> re.Match | None:
    match = None
    for match in matches:  # noqa: B007  (the last one is wanted)
        pass
    return match


def _last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` whose braces balance."""
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.end() : end].strip()
    return None


def normalise_answer(answer: str) -> Fraction | str:
    """Return a number as an exact fraction, anything else as text without spaces, LaTeX dressing and case."""
    text = _FRACTION.sub(r"(\1)/(\2)", answer.strip())
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\left|\\right|\\[ ,;!%$]|[$%]|\^\\circ|°", "", text)
    text = text.rsplit("=", 1)[-1].strip().rstrip(".").strip()
    bare = re.sub(r"[\s()]|,(?=\d{3}(?:\D|$))", "", text)
    if re.fullmatch(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/-?\d+)?", bare):
        numerator, _, denominator = bare.partition("/")
        if int(denominator or 1):
            return Fraction(numerator) / int(denominator or 1)
    return re.sub(r"\s+", "", text).lower()


def is_correct(response: str, answer: str, pattern: str = "auto") -> bool:
    """Whether the response's final answer equals `answer` (itself bare, or with the same markers as a response)."""
    found = extract_answer(response, pattern)
    if found is None:
        return False
    marked = _last_boxed(answer) if "\\boxed" in answer else answer.rsplit("####", 1)[-1]
    return normalise_answer(found) == normalise_answer(marked if marked is not None else answer)


def evaluate(
    engine: RolloutEngine,
    problems: list[Prompt],
    config: EvaluationConfig,
    groups: ParallelGroups,
    *,
    max_new_tokens: int = 512,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = True,
    role: str = "student",
    on_nan: str = "stop",
) -> dict[str, Any]:
    """Answer every problem `config.samples` times and count the right answers; collective over all ranks.

    Problems are dealt to the data-parallel ranks and the results gathered, so every rank returns the same, whatever the
    layout. The engine is asked for `batch_size` responses at a time; config.max_new_tokens goes first.
    Responses drawn from logits that are not finite are refused (`role` is the model's), or warned of with on_nan=skip.

    Returns:
        accuracy, correct, total, mean_response_length, finish_reasons (counts) and samples (one dict a response).
    """
    from megatron_tropd.number_guard import check_responses

    sampling = Sampling(
        samples_per_prompt=config.samples,
        max_new_tokens=config.max_new_tokens or max_new_tokens,
        temperature=config.temperature,
        seed=seed,
    )
    mine = problems[groups.dp_rank :: groups.dp_size]
    chunk = max(1, batch_size // config.samples)
    graded: list[dict[str, Any]] = []
    with tqdm(total=len(mine), desc="evaluate", unit="problem", disable=not progress or dist.get_rank() > 0) as bar:
        for start in range(0, -(-len(problems) // groups.dp_size), chunk):  # as often on every rank
            batch = mine[start : start + chunk]
            rollouts = engine.generate(batch, [[] for _ in batch], sampling)
            check_responses(rollouts, role, on_nan)
            graded += _grade(rollouts, config.answer_pattern)
            bar.update(len(batch))
            accuracy = sum(s["correct"] for s in graded) / max(1, len(graded))
            bar.set_postfix(accuracy=f"{accuracy:.3f}", refresh=False)
    if groups.dp_size > 1:
        gathered: list[Any] = [None] * groups.dp_size
        dist.all_gather_object(gathered, graded, group=groups.dp)
        graded = [sample for part in gathered for sample in part]
    return summarise(sorted(graded, key=lambda sample: sample["sample_id"]))


def _grade(rollouts: Any, pattern: str) -> list[dict[str, Any]]:
    graded = []
    for i, prompt in enumerate(rollouts.prompts):
        graded.append(
            {
                "sample_id": rollouts.sample_ids[i],
                "id": prompt.id,
                "response": rollouts.texts[i],
                "found": extract_answer(rollouts.texts[i], pattern),
                "answer": prompt.answer,
                "correct": is_correct(rollouts.texts[i], prompt.answer, pattern),
                "finish_reason": rollouts.finish_reasons[i],
                "length": rollouts.lengths[i] - rollouts.prompt_lengths[i] - rollouts.prefix_lengths[i],
            }
        )
    return graded


def summarise(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the totals over graded samples, and the samples themselves."""
    total = len(samples)
    correct = sum(sample["correct"] for sample in samples)
    return {
        "accuracy": correct / total if total else 0.0,
        "correct": correct,
        "total": total,
        "mean_response_length": sum(sample["length"] for sample in samples) / total if total else 0.0,
        "finish_reasons": dict(Counter(sample["finish_reason"] for sample in samples)),
        "samples": samples,
    }
