"""Converts conversations of common formats to the form that chat templates read; problems are ValueErrors.

messages = clean_messages([{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}])
messages, response = split_response(messages, "response")   # [{"role": "user", "content": "2 + 2?"}], "4"
"""

from __future__ import annotations

import json
from typing import Any

_ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "function-response"), "tool"),
}
KNOWN_ROLES = {"system", "user", "assistant", "tool", "developer", "function", "ipython"}
_FROM_FIELDS = {"from": "role", "value": "content"}  # ShareGPT's names
_PAIRS = (("input", "output"), ("user", "assistant"), ("human", "assistant"), ("human", "gpt"), ("prompt", "response"))
_PLAIN = ("role", "content")
_BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def check_text(value: Any, name: str) -> str:
    """Return a string that has characters and can be encoded; ValueError names it otherwise."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is a {type(value).__name__}, expected a string")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    check_encodable(value, name)
    return value


def check_encodable(value: Any, name: str) -> None:
    """Raise ValueError if a string in `value`, however deep, holds half of a surrogate pair."""
    if isinstance(value, str):
        if value.isascii():
            return
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} holds the lone surrogate {ascii(value[error.start])[1:-1]} at character {error.start + 1}, "
                "half of a character that was cut in two: no tokenizer can encode it"
            ) from error
    elif isinstance(value, dict):
        for key, item in value.items():
            check_encodable(key, name)
            check_encodable(item, name)
    elif isinstance(value, list):
        for item in value:
            check_encodable(item, name)


def parse_nested(value: Any, name: str) -> Any:
    """Return a list or object that a file without nested types (CSV) holds as JSON text; other values as they are."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is text that begins like JSON and is not ({error})") from error


def clean_messages(value: Any, name: str = "messages", may_be_turns: bool = False) -> list[dict[str, Any]]:
    """Return messages with `role` and `content`: ShareGPT's fields and roles renamed, text parts joined.

    Other fields of a message (tool_calls, name) stay for the template. With `may_be_turns` a list of strings, or of
    pairs such as {"input", "output"}, is a conversation that the user begins.
    """
    value = parse_nested(value, name)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]  # by columns
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is empty or not a list")
    if may_be_turns and (type(value[0]) is not dict or "role" not in value[0]):
        value = _from_turns(value)
    messages = [_clean(message, name) for message in value]
    last = messages[-1]
    if not (last["content"] or "").strip() and not last.get("tool_calls"):
        raise ValueError(f"the last of {name} has empty content")
    return messages


def looks_like_messages(text: str) -> bool:
    """Return whether a string is JSON text of a list of messages, and not a prompt that begins with a bracket."""
    if not text.startswith(("[", " ", "\n")) or text.lstrip()[:1] != "[":
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def earlier_turns(history: Any) -> list[dict[str, Any]]:
    """Return the messages of a `history` of [question, response] pairs, as instruction files have it beside a row."""
    history = parse_nested(history, "history")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("history is no list of [question, response] pairs; write the conversation as messages")
    return clean_messages([text for pair in history for text in pair], "history", may_be_turns=True)


def _from_turns(value: list[Any]) -> list[Any]:
    """Turn a list of strings (LIMA), or of objects that hold two turns each (Capybara), into messages."""
    if all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(value)]
    for asks, answers in _PAIRS:
        if all(isinstance(turn, dict) and asks in turn and answers in turn for turn in value):
            turns = [
                {"role": role, "content": turn[key]}
                for turn in value
                for role, key in (("user", asks), ("assistant", answers))
            ]
            return turns[:-1] if turns[-1]["content"] in (None, "") else turns
    return value


def _clean(message: Any, name: str) -> dict[str, Any]:
    if type(message) is dict and tuple(message) == _PLAIN and message["role"] in KNOWN_ROLES:  # nearly all are so
        content = message["content"]
        if type(content) is str:
            if not content.isascii():
                check_encodable(content, name)
            return message
    if isinstance(message, dict):
        message = {key: item for key, item in message.items() if item is not None}
        if "role" not in message and "from" in message:
            message = {_FROM_FIELDS.get(key, key): item for key, item in message.items()}
        elif "content" not in message and "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"each of {name} must be an object with string `role` and `content` (or `from` and `value`)")
    message = {**message, "content": message.get("content")}
    role = message["role"].strip()
    if role.lower() in ("function_call", "tool_call"):
        return _clean_call(message, name)
    message["role"] = _ROLES.get(role.lower(), role.lower() if role.lower() in KNOWN_ROLES else role)
    if message.get("tool_calls"):
        message["tool_calls"] = _clean_calls(message["tool_calls"], name)
    if isinstance(message["content"], list):
        message["content"] = _join_parts(message["content"], name)
    if message["content"] is None and message.get("tool_calls"):
        return message
    if not isinstance(message["content"], str):
        raise ValueError(
            f"each of {name} must be an object with string `role` and `content`, and the content of a "
            f"{message['role']} message is {'missing' if message['content'] is None else _kind(message['content'])}"
        )
    check_encodable(message["content"] if len(message) == 2 else message, name)
    return message


def _clean_calls(calls: Any, name: str) -> list[Any]:
    """Return tool calls with their arguments as objects: templates write strings as quoted ones."""
    calls = parse_nested(calls, f"tool_calls of {name}")
    if not isinstance(calls, list):
        raise ValueError(f"the tool_calls of {name} are {_kind(calls)}, expected a list")
    return [_with_objects(parse_nested(call, f"a tool call of {name}")) for call in calls]


def _with_objects(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_objects(call["function"])}
    text = call.get("arguments")
    if not isinstance(text, str):
        return call
    try:
        arguments = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return call  # not JSON: the model's own, as it wrote it
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def parse_tools(value: Any, are_tools: bool = True) -> Any:
    """Return tools as objects, where a list holds the JSON text of each; OpenAI's older functions are wrapped."""
    if not isinstance(value, list):
        return value
    tools = [parse_nested(tool, "one of tools") for tool in value]
    return tools if are_tools else [{"type": "function", "function": tool} for tool in tools]


def _clean_call(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Turn ShareGPT's turn that is a call, as JSON text, into an assistant message with tool_calls."""
    call = parse_nested(message["content"], f"a {message['role']} of {name}")
    calls = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(item, dict) and "name" in item for item in calls):
        raise ValueError(f"a {message['role']} of {name} is no JSON object with `name` and `arguments`")
    calls = [{"type": "function", "function": _with_objects(item)} for item in calls]
    check_encodable(calls, name)
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _join_parts(parts: list[Any], name: str) -> str:
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else _kind(part)
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if (isinstance(part, dict) and kind != "text") or not isinstance(text, str):
            raise ValueError(f"{name} holds a content part of type {kind}; only text can be distilled")
        texts.append(text)
    return "".join(texts)


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"


def response_of(value: list[Any], asked: list[dict[str, Any]] | None) -> Any:
    """Return the text of a response that is given as messages: the assistant's turn, after the prompt's or alone."""
    if not value or not all(isinstance(turn, dict) for turn in value):
        return value
    turns = clean_messages(value, "the response's messages")
    if asked and turns[: len(asked)] == asked:
        turns = turns[len(asked) :]
    if len(turns) == 1 and turns[0]["role"] == "assistant" and not turns[0].get("tool_calls"):
        return turns[0]["content"]
    return value


def split_response(messages: list[dict[str, Any]], assistant_turn: str) -> tuple[list[dict[str, Any]], str | None]:
    """Take the assistant's turn off the end of a conversation; None where it ends with another role.

    `assistant_turn` is the recipe's data.assistant_turn: "response", or "refuse" for a ValueError.
    """
    last = messages[-1]
    if last["role"] != "assistant":
        return messages, None
    if assistant_turn == "refuse":
        raise ValueError(
            "the last message is the assistant's, and data.assistant_turn=refuse; remove it, or set "
            "data.assistant_turn=response to take it as the teacher_response"
        )
    beside = [field for field in _BESIDE_CONTENT if last.get(field)]
    if beside:
        raise ValueError(
            f"the last message is the assistant's and has {beside[0]}, which only a chat template can write out; give "
            "the response as the model writes it, in teacher_response, and end the messages before it"
        )
    prompt = messages[:-1]
    if prompt and (last.get("weight") == 0 or last.get("train") is False or last.get("loss") is False):
        return prompt, None  # marked as not to be trained on
    if not prompt or prompt[-1]["role"] == "assistant":
        raise ValueError("there is no message of another role before the assistant's last one: nothing asks for it")
    return prompt, check_text(last["content"], "the assistant's last message")
