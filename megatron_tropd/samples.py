"""Rollouts as records for samples.jsonl: each token with its part in the loss, its gate and both log-probs."""

from __future__ import annotations

from typing import Any

from megatron_tropd.objectives import TokenDetails
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.types import Rollouts


def sample_records(
    rollouts: Rollouts, details: TokenDetails | None, tokenizer: Tokenizer, count: int
) -> list[dict[str, Any]]:
    """Return the first `count` rollouts, as `tools/inspect_rollouts.py` reads them.

    Args:
        rollouts: this rank's samples.
        details: of this rank's batch, whose first rows are the rollouts; None without a teacher.
        tokenizer: decodes prompt and tokens.
        count: at most so many.
    """
    rows = min(count, len(rollouts))
    if details is None:
        return [_record(rollouts, i, tokenizer, None) for i in range(rows)]
    rows = min(rows, details.student_logprobs.size(0))
    names = ("student_logprob", "teacher_logprob", "rho", "weight")
    tensors = (details.student_logprobs, details.teacher_logprobs, details.gate.rho, details.gate.weight)
    numbers = [tensor[:rows].tolist() for tensor in tensors]
    return [
        _record(rollouts, i, tokenizer, dict(zip(names, (values[i] for values in numbers), strict=True)))
        for i in range(rows)
    ]


def _record(
    rollouts: Rollouts, row: int, tokenizer: Tokenizer, numbers: dict[str, list[float]] | None
) -> dict[str, Any]:
    sequence, start = rollouts.tokens[row], rollouts.prompt_lengths[row]
    prefix_end = start + rollouts.prefix_lengths[row]
    tokens = []
    for position in range(start, rollouts.lengths[row]):
        token: dict[str, Any] = {"text": tokenizer.pieces().get(sequence[position], ""), "kind": "guidance"}
        if decoded := tokenizer.decode_response([sequence[position]]):
            token["text"] = decoded
        if position >= prefix_end and numbers is not None:
            # Position t of a score speaks of token t + 1.
            token |= {name: values[position - 1] for name, values in numbers.items()}
            token["kind"] = "trust" if token["weight"] >= 0.5 else "outlier"
        tokens.append(token)
    return {
        "sample_id": rollouts.sample_ids[row],
        "prompt_id": rollouts.prompts[row].id,
        "prompt": tokenizer.decode(sequence[:start]),
        "finish_reason": rollouts.finish_reasons[row],
        "tokens": tokens,
    }
