"""A conversation with an open model: its history, its next reply, and the reply's text while it is drawn.

with open_model(recipe, "student") as model:
    conversation = Conversation(model, make_sampling(recipe.rollout, seed=1), system=None)
    conversation.engine = model.engine()
    reply = conversation.ask("2 + 2?", write=print)
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.errors import UserError
from megatron_tropd.evaluation.generation import OpenModel
from megatron_tropd.models.convert import load_model_weights
from megatron_tropd.numbers.finite_weights import check_loaded
from megatron_tropd.numbers.guard import check_responses
from megatron_tropd.parallel.groups import from_rank_zero
from megatron_tropd.rollout.decoding import Stops
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.rollout.sampling import Response
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt, Sampling


class Refused(UserError):
    """A message that gets no reply; the conversation can go on without it."""


_UNFINISHED = "\ufffd"  # how a tokenizer shows bytes that may yet become a character


class TextStream:
    """Writes the text of one response while it is drawn: only what no later token changes.

    Held back are the bytes of an unfinished character and what may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], write: Callable[[str], object]):
        """Write with `write`, which gets the pieces in order; `stop` are the stop strings of the sampling."""
        self._decode = tokenizer.decode_response
        self._held = max((len(text) for text in Stops.of(tokenizer, stop).texts), default=1) - 1
        self._write = write
        self._written = ""

    def __call__(self, response: Response) -> None:
        """Take note of a token that was just recorded."""
        if response.finish_reason is None:
            text = self._decode(response.tokens)
            text = text[: min(len(text.rstrip(_UNFINISHED)), len(text) - self._held)]
            if text.startswith(self._written):
                self._put(text)

    def finish(self, text: str) -> None:
        """Write the rest of the whole reply `text`.

        A tokenizer may read earlier bytes otherwise once it has seen all: the whole text then follows on a new line.
        """
        if not text.startswith(self._written):
            self._write("\n")
            self._written = ""
        self._put(text)

    def _put(self, text: str) -> None:
        if len(text) > len(self._written):
            self._write(text[len(self._written) :])
            self._written = text


@dataclass
class Reply:
    """One reply of the model."""

    text: str
    tokens: list[int]  # the model's own, an end-of-text id included
    seconds: float  # from the prompt to the last token
    finish_reason: str  # as in Rollouts; "context": the context is full

    def summary(self) -> str:
        """Return tokens, tokens per second and finish reason as a line."""
        reason = {"length": "length: --max-new-tokens", "context": "the context is full: /reset"}
        rate = len(self.tokens) / max(self.seconds, 1e-9)
        return f"{len(self.tokens)} tokens, {rate:.1f} tokens/s, {reason.get(self.finish_reason, self.finish_reason)}"


class Conversation:
    """The messages so far and how the next reply is drawn; the same on all ranks.

    Attributes:
        is_plain: the tokenizer has no chat template, so the messages are lines of plain text.
        engine: generates; to be set before the first reply.
    """

    engine: RolloutEngine

    def __init__(self, model: OpenModel, sampling: Sampling, system: str | None = None):
        """Start an empty conversation.

        Args:
            model: the opened model; its weights may be unread yet.
            sampling: how tokens are drawn; its step counts the replies, so that no two share their random numbers.
            system: text of a system message that begins the conversation.

        Raises:
            UserError: the chat template refuses a conversation of this kind.
        """
        self.is_plain = model.tokenizer.template is None
        self._model, self._sampling = model, dataclasses.replace(sampling, samples_per_prompt=1)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._context = model.hf_config.max_position_embeddings
        self._replies = 0
        self.reset()
        model.tokenizer.encode_prompt(self._prompt("Hello"))  # a template that refuses is known before weights are read

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self._messages: list[dict[str, str]] = list(self._system)

    def load(self, checkpoint: str | Path) -> None:
        """Read other weights of the same model into the engine's; the messages stay. Collective over all ranks.

        Raises:
            UserError: `checkpoint` is no whole weights checkpoint of this model, or holds numbers that are not finite.
        """
        model, chunks = self._model, list(self.engine.chunks)
        model.config.checkpoint = str(checkpoint)
        load_model_weights(chunks, model.config, model.groups)
        check_loaded(chunks, model.config, model.role)

    def _prompt(self, text: str) -> Prompt:
        messages = [*self._messages, {"role": "user", "content": text}]
        if self.is_plain:
            return Prompt(id="chat", text="".join(f"{message['content']}\n" for message in messages))
        return Prompt(id="chat", messages=messages)

    def ask(self, text: str, write: Callable[[str], object] | None = None) -> Reply:
        """Draw the reply to the user's message `text`; both then belong to the conversation. Collective over all ranks.

        Args:
            text: the message.
            write: gets the reply's text in pieces while it is drawn.

        Raises:
            Refused: the template refuses the message, or no token fits in the context after it; the conversation is
                as before.
            UserError: the model's logits are not finite.
        """
        prompt = self._tokenized(text)
        sampling = dataclasses.replace(self._sampling, step=self._sampling.step + self._replies)
        stream = None if write is None else TextStream(self._model.tokenizer, sampling.stop, write)
        start = time.monotonic()
        rollouts = self.engine.generate([prompt], [[]], sampling, on_token=stream)
        seconds = time.monotonic() - start
        check_responses(rollouts, self._model.role)
        reason = rollouts.finish_reasons[0]
        if stream is not None:
            stream.finish(rollouts.texts[0])
        if reason == "length" and rollouts.lengths[0] >= self._context:
            reason = "context"
        # Rounding on a GPU may let data-parallel replicas part, and their later prompts must be the same.
        answer = from_rank_zero(lambda: rollouts.texts[0])
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        self._replies += 1
        return Reply(answer, rollouts.tokens[0][len(prompt.tokens) :], seconds, reason)

    def _tokenized(self, text: str) -> Prompt:
        prompt = self._prompt(text)
        try:
            prompt.tokens = self._model.tokenizer.encode_prompt(prompt)
        except UserError as error:
            raise Refused(str(error)) from error
        if len(prompt.tokens) >= self._context:
            is_first = self._messages == self._system
            remedy = "write a shorter message" if is_first else "/reset starts a new conversation"
            raise Refused(
                f"the context of {self._context} tokens is full: the conversation with this message has "
                f"{len(prompt.tokens)}; {remedy}."
            )
        return prompt
