"""Converts teacher responses of servers and engines to {"id", "teacher_response", "finish_reason"}.

It reads results of OpenAI batches (also written by vLLM's run-batch) and Anthropic batches, and rows with an id and
vLLM's `outputs`, a server's `choices`, TGI's `generated_text` or SGLang's `meta_info`.
"""

from __future__ import annotations

from typing import Any

COLUMNS = {"custom_id", "result", "outputs", "choices", "generated_text", "details", "meta_info", "text", "error"}
_APART = ("reasoning_content", "reasoning", "tool_calls", "function_call")


def plain_response(row: dict[str, Any]) -> dict[str, Any]:
    """Return `row` in the plain format, or unchanged if its format is not known here.

    Raises:
        ValueError: a request failed, or the response is not all in its text.
    """
    if row.get("custom_id") is not None:
        return {"id": row["custom_id"], **_first(_choices_of_batch(row))}
    if row.get("teacher_response") is not None or row.get("id") is None:
        return row
    details = row.get("details") or row.get("meta_info") or {}
    reason = details.get("finish_reason") if isinstance(details, dict) else None
    if isinstance(row.get("generated_text"), str):
        return {"id": row["id"], "teacher_response": row["generated_text"], "finish_reason": reason}
    if isinstance(row.get("text"), str) and "meta_info" in row:
        return {"id": row["id"], "teacher_response": row["text"], "finish_reason": reason}
    choices = row.get("outputs") or row.get("choices")
    if isinstance(choices, list) and choices and all(isinstance(choice, dict) for choice in choices):
        return {"id": row["id"], **_first([_of_choice(choice) for choice in choices])}
    return row


def _choices_of_batch(row: dict[str, Any]) -> list[dict[str, Any]]:
    response, result = row.get("response"), row.get("result")
    if isinstance(result, dict):  # Anthropic's
        if result.get("type") != "succeeded":
            raise ValueError(f"the request {row['custom_id']!r} {result.get('type')}: ask again, or remove the line")
        message = result.get("message") or {}
        return [{"teacher_response": _text(message), "finish_reason": message.get("stop_reason")}]
    reply = response if isinstance(response, dict) else {}
    body = reply.get("body")
    if not isinstance(body, dict) or row.get("error") or body.get("error") or reply.get("status_code", 200) >= 400:
        raise ValueError(
            f"the request {row['custom_id']!r} failed ({str(row.get('error') or (body or {}).get('error'))[:200]}): "
            "ask again, or remove the line"
        )
    choices = body.get("choices")
    if isinstance(choices, list) and choices:
        return [_of_choice(choice) for choice in choices]
    messages = [item for item in body.get("output") or () if item.get("type") == "message"]
    if len(messages) != 1:
        raise ValueError(f"the response to {row['custom_id']!r} holds {len(messages)} messages, expected one")
    return [{"teacher_response": _text(messages[0]), "finish_reason": body.get("status")}]


def _of_choice(choice: dict[str, Any]) -> dict[str, Any]:
    text = _text(choice["message"]) if isinstance(choice.get("message"), dict) else choice.get("text")
    return {"teacher_response": text, "finish_reason": choice.get("finish_reason")}


def _text(message: dict[str, Any]) -> Any:
    apart = next((name for name in _APART if message.get(name)), None)
    content = message.get("content")
    kinds = {part.get("type") for part in content} if isinstance(content, list) else set()
    if apart is not None or not kinds <= {"text", "output_text"}:
        raise ValueError(
            f"the response has {apart or ', '.join(sorted(map(str, kinds)))} apart from its text, so the text alone is "
            "not what the model wrote; generate without a reasoning or tool parser, or give teacher_response as written"
        )
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def _first(choices: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the first choice that was not cut, else the first."""
    return next((choice for choice in choices if choice["finish_reason"] not in ("length", "max_tokens")), choices[0])
