"""Rollouts as records for samples.jsonl: each token with its part in the loss, its gate and both log-probs.

Beside them the tokens that the teacher finds most probable there, where the objective asked it for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_tropd.objective.result import TokenDetails
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt, Rollouts, TeacherScores

_ALTERNATIVES = 5  # of the teacher, per token


def sample_records(
    rollouts: Rollouts,
    details: TokenDetails | None,
    tokenizer: Tokenizer,
    count: int,
    scores: TeacherScores | None = None,
    dropped: Sequence[bool] = (),
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts, as `tools/inspect_rollouts.py` reads them.

    Args:
        rollouts: this rank's samples.
        details: of this rank's batch, whose first rows are the rollouts; None without a teacher.
        tokenizer: decodes prompt and tokens.
        count: largest number of records.
        scores: the teacher's of this rank's batch, for its most probable tokens.
        dropped: of each rollout, whether it was left out of the loss, and so has no numbers; empty: of none.
    """
    rows = min(count, len(rollouts))
    left_out = dropped or [False] * rows
    if details is None:
        return [_record(rollouts, i, tokenizer, None, left_out[i]) for i in range(rows)]
    rows = min(rows, details.student_logprobs.size(0))
    names = ["student_logprob", "teacher_logprob", "rho", "weight"]
    tensors = (details.student_logprobs, details.teacher_logprobs, details.gate.rho, details.gate.weight)
    numbers = [tensor[:rows].tolist() for tensor in tensors]
    if scores is not None and scores.topk_ids.size(-1):
        names += ["alternatives", "alternative_logprobs"]
        numbers += [tensor[:rows, :, :_ALTERNATIVES].tolist() for tensor in (scores.topk_ids, scores.topk_logprobs)]
    return [
        _record(rollouts, i, tokenizer, dict(zip(names, (values[i] for values in numbers), strict=True)), left_out[i])
        for i in range(rows)
    ]


@lru_cache(maxsize=2**16)
def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.decode_response([token]) or tokenizer.pieces().get(token, "")


def _record(
    rollouts: Rollouts, row: int, tokenizer: Tokenizer, numbers: dict[str, list[float]] | None, is_dropped: bool
) -> dict[str, Any]:
    sequence, start = rollouts.tokens[row], rollouts.prompt_lengths[row]
    prefix_end = start + rollouts.prefix_lengths[row]
    tokens, kind = [], "dropped" if is_dropped else "guidance"  # of tokens without numbers
    for position in range(start, rollouts.lengths[row]):
        token: dict[str, Any] = {"text": _text(tokenizer, sequence[position]), "kind": kind}
        if position >= prefix_end and numbers is not None and not is_dropped:
            # The score at position t belongs to token t + 1.
            token |= {name: values[position - 1] for name, values in numbers.items()}
            token["kind"] = "trust" if token["weight"] >= 0.5 else "outlier"
            if logprobs := token.pop("alternative_logprobs", None):
                texts = [_text(tokenizer, token_id) for token_id in token["alternatives"]]
                listed = zip(texts, logprobs, strict=True)  # fewer where the teacher rules out all others
                token["alternatives"] = [[text, round(x, 4)] for text, x in listed if x != -math.inf]
        tokens.append(token)
    return {
        "sample_id": rollouts.sample_ids[row],
        "prompt_id": rollouts.prompts[row].id,
        "prompt": tokenizer.decode(sequence[:start]),
        "finish_reason": rollouts.finish_reasons[row],
        "tokens": tokens,
    }


def answer_records(step: int, graded: list[dict[str, Any]], problems: list[Prompt], count: int) -> list[dict[str, Any]]:
    """Return the responses to the first `count` problems for answers.jsonl, each with its prompt.

    Args:
        step: the number of steps done before the evaluation.
        graded: the evaluation's samples, in the problems' order.
        problems: what was asked.
        count: largest number of problems, the first sample of each; the same problems at every evaluation.
    """
    asked = {problem.id: _asked(problem) for problem in problems[:count]}
    first: dict[str, dict[str, Any]] = {}
    for sample in graded:
        if sample["id"] in asked:
            first.setdefault(sample["id"], sample)
    return [{"step": step, "prompt": asked[key], **sample} for key, sample in first.items()]


def _asked(problem: Prompt) -> str:
    if problem.messages is None:
        return problem.text or ""
    return "\n\n".join(f"{m.get('role', '')}: {_plain(m.get('content'))}" for m in problem.messages)


def _plain(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
