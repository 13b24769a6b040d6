"""Digests of prompts, of the text for the model and of the whole row; a resumed run compares them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from megatron_tropd.types import Prompt

_PLAIN_ROLES = {"system", "user", "assistant"}  # templates may write a tool's answer with escapes, which JSON counts
_AROUND = 32  # bytes
to_json = json.JSONEncoder(default=str).encode


def digests(prompt: Prompt) -> tuple[int, int, int]:
    """Return the size of a prompt's content, 64 bits of everything that its row gives, and 64 bits of the content.

    The content is what the model is asked: messages or text, tools and template arguments. Its size is at least the
    bytes of its text in UTF-8, and some for what a template writes around each message.
    """
    content = _plain_content(prompt.messages) if not (prompt.tools or prompt.chat_template_kwargs) else None
    if content is None:
        content = to_json([prompt.messages, prompt.text, prompt.tools, prompt.chat_template_kwargs])
    encoded = content.encode()
    state = hashlib.blake2b(encoded, digest_size=8)
    contents = state.digest()
    rest = (prompt.id, prompt.teacher_response, prompt.teacher_finish_reason, prompt.answer, prompt.domain)
    state.update("".join(["-" if value is None else f"{len(value)}:{value}" for value in rest]).encode())
    size = len(encoded) + _AROUND * len(prompt.messages or ())
    return size, int.from_bytes(state.digest(), "little"), int.from_bytes(contents, "little")


def _plain_content(messages: list[dict[str, Any]] | None) -> str | None:
    """Return messages of a role and a text each as one string, None for others: the JSON of most rows is slow."""
    if not messages:
        return None
    parts = []
    for message in messages:
        role, text = message["role"], message["content"]
        if len(message) != 2 or role not in _PLAIN_ROLES:
            return None
        parts.append(f"{role}:{len(text)}:{text}")
    return "".join(parts)
