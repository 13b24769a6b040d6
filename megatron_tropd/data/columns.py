"""Column names of common data sets, and the columns from which each value of a Prompt may come."""

from __future__ import annotations

from megatron_tropd.data.choices import ANSWERS as CHOICE_ANSWERS
from megatron_tropd.data.choices import CHOICES

CHATS = ("messages", "conversations", "conversation")
_QUESTIONS = ("prompt", "question", "problem", "instruction", "query", "input")
_PROMPTS = (*CHATS, "text", *_QUESTIONS)
ANSWERS = ("final_answer", "ground_truth", "expected_answer", "reward_model.ground_truth")
RESPONSES = ("completion", "response", "output")
_SYSTEMS = ("system", "system_prompt")
INPUTS = ("input", "context")  # what an Alpaca or Dolly instruction is about
REASONS = ("teacher_finish_reason", "finish_reason", "stop_reason")
OWN = ("id", "messages", "text", "prompt", "answer", "teacher_response", "domain", "tools", "chat_template_kwargs")
_TOOLS = ("tools", "functions")
# Columns of known layouts that are not used by themselves:
_BESIDE = {"reward_model", "extra_info", "ability", "data_source", "solution", "label", "history"}
KNOWN = {*OWN, *_PROMPTS, *ANSWERS, *RESPONSES, *_SYSTEMS, *INPUTS, *REASONS, *_BESIDE, *_TOOLS}
KNOWN |= {*CHOICES, *CHOICE_ANSWERS}
BY_LOWER_CASE = {name.lower(): name for name in KNOWN}
# Where a value is looked for: the recipe's role, whose column takes precedence, and the columns known without it.
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "prompt": ("", _PROMPTS),
    "id": ("id", ("id",)),
    "system": ("system", _SYSTEMS),
    "tools": ("tools", _TOOLS),
    "chat_template_kwargs": ("", ("chat_template_kwargs",)),
    "own answer": ("answer", ("answer",)),
    "answer": ("answer", ANSWERS),
    "choice": ("answer", CHOICE_ANSWERS),
    "own teacher_response": ("teacher_response", ("teacher_response",)),
    "teacher_response": ("teacher_response", RESPONSES),
    "finish_reason": ("finish_reason", REASONS),
    "domain": ("domain", ("domain",)),
    "verl's domain": ("domain", ("data_source",)),
}
