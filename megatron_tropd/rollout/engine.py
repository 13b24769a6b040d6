"""RolloutEngine: generates the student's responses with the training weights, in Megatron's inference path.

Megatron-Core's dynamic engine (paged key/value cache, requests join and leave) on CUDA and on CPU; its static engine
where asked for. Cache and CUDA graphs are made for each call and freed with it. Nothing of the loss is known here.

    engine = RolloutEngine(modules, tokenizer, groups, recipe.rollout, max_sequence_length=context)
    rollouts = engine.generate(prompts, prefixes, Sampling(samples_per_prompt=4, max_new_tokens=512, seed=1, step=7))
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from megatron_tropd.config import RolloutConfig
from megatron_tropd.mcore.attention_compat import choose_attention, inference_attention
from megatron_tropd.mcore.decode_graphs import graph_obstacle
from megatron_tropd.mcore.engine_compat import prefill_tokens, run_dynamic_engine, run_static_engine
from megatron_tropd.mcore.inference_compat import attends_whole_sequences, inference_model
from megatron_tropd.mcore.kv_cache import CPU_BLOCK_TOKENS, CUDA_BLOCK_TOKENS, cache_bytes, rounded_requests
from megatron_tropd.parallel import cpu_compat
from megatron_tropd.parallel.groups import ParallelGroups
from megatron_tropd.rollout.decoding import Stops
from megatron_tropd.rollout.device_memory import free_device_gb, least_of_replica
from megatron_tropd.rollout.endings import Endings
from megatron_tropd.rollout.sampling import Response, Sampler
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.types import Prompt, Rollouts, Sampling, UserError

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

logger = logging.getLogger(__name__)

OnToken = Callable[[Response], object]


class RolloutEngine:
    """Generates with the model chunks that train; they come back in the mode that they were in."""

    def __init__(
        self,
        chunks: list[GPTModel],
        tokenizer: Tokenizer,
        groups: ParallelGroups,
        config: RolloutConfig,
        max_sequence_length: int,
        endings: Endings | None = None,
    ):
        """Describe the engine; nothing is allocated yet.

        Args:
            chunks: this rank's bare GPTModel chunks, one or, interleaved, several.
            tokenizer: its vocabulary bounds what is drawn.
            groups: process groups of the model.
            config: `rollout.*`: engine, max_batch_size, kv_cache_gb.
            max_sequence_length: the model's context.
            endings: what ends a response, and which of these ids are one event, whose log-prob is then that of all
                of them; default: the tokenizer's.

        Raises:
            UserError: the static engine with replicas that share experts.
        """
        self.chunks = chunks
        self.tokenizer = tokenizer
        self.groups = groups
        self.config = config
        self.max_sequence_length = max_sequence_length
        self.endings = endings or Endings.of(tokenizer)
        self.end = self.endings.end_of_text()
        if self._use_static() and groups.lockstep:
            raise UserError(
                "rollout.engine=static does not support MoE experts that are sharded over replicas; use "
                "rollout.engine=dynamic."
            )
        if self._use_static() and groups.cp_size > 1 and not attends_whole_sequences(chunks):
            raise UserError(
                "rollout.engine=static with context_parallel_size > 1 needs Megatron's local attention: Transformer "
                "Engine's would take the whole sequence on each rank for a shard of it. Use rollout.engine=dynamic."
            )

    def generate(
        self, prompts: list[Prompt], prefixes: list[list[int]], sampling: Sampling, on_token: OnToken | None = None
    ) -> Rollouts:
        """Write `sampling.samples_per_prompt` responses to each prompt.

        Collective over the tensor- and pipeline-parallel ranks, which all get the same prompts and return the same
        rollouts; data-parallel ranks work independently, but for those that share experts (groups.lockstep): they must
        call it together, without prompts if need be. The same seed gives the same responses whatever the layout,
        the batch or the engine.

        Args:
            prompts: tokenized prompts; sample ids derive from their `index`.
            prefixes: per prompt the token ids of the teacher's prefix from which every sample continues, perhaps
                empty; one that ends with EOS is a whole response, and nothing is generated.
            sampling: how tokens are drawn.
            on_token: called with a response after each of its tokens is recorded, on each rank that gives it.

        Raises:
            UserError: a prompt and its prefix leave no room in the context.
        """
        responses = [
            self._response(prompt, prefix, prompt.index * sampling.samples_per_prompt + i, sampling)
            for prompt, prefix in zip(prompts, prefixes, strict=True)
            for i in range(sampling.samples_per_prompt)
        ]
        unfinished = [r for r in responses if r.finish_reason is None]
        with inference_model(self.chunks, self.groups) as model, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"megatron\.core")  # deprecations inside Megatron's own calls
            if self._use_static():
                for start in range(0, len(unfinished), self.config.max_batch_size):
                    self._run_static(model, unfinished[start : start + self.config.max_batch_size], sampling, on_token)
            elif unfinished or self.groups.lockstep:
                self._run_dynamic(model, unfinished, sampling, on_token)
        if self.groups.device.type == "cuda":
            torch.cuda.empty_cache()  # the cache's block would otherwise stay with the allocator, whole or in pieces
        return self._as_rollouts(responses, sampling)

    def _response(self, prompt: Prompt, prefix: list[int], sample_id: int, sampling: Sampling) -> Response:
        response = Response(prompt, sample_id, prefix, budget=0)
        if prefix and prefix[-1] in self.endings.eos:
            response.finish_reason = "prefix"
            return response
        room = self.max_sequence_length - len(response.start)
        response.budget = min(sampling.max_new_tokens - len(prefix), room)
        if room < 1 and sampling.max_new_tokens > len(prefix):
            raise UserError(
                f"prompt {prompt.id!r} has {len(prompt.tokens)} tokens and a prefix of {len(prefix)}, and the context "
                f"is {self.max_sequence_length}: no room for a response. Shorten it, or lower rollout.max_new_tokens."
            )
        if response.budget < 1:
            response.finish_reason = "length"
        return response

    def _use_static(self) -> bool:
        return self.config.engine == "static"

    def _run_dynamic(
        self, model: GPTModel, responses: list[Response], sampling: Sampling, on_token: OnToken | None
    ) -> None:
        cpu_compat.apply_inference()
        longest = max((len(r.start) + r.budget for r in responses), default=2)
        max_requests = rounded_requests(min(len(responses), self.config.max_batch_size), self.groups.tp_size)
        on_cuda = self.groups.device.type == "cuda"
        block = CUDA_BLOCK_TOKENS if on_cuda else CPU_BLOCK_TOKENS
        config = self.chunks[0].config
        attention = choose_attention(self.config.attention, config, self.groups.device)
        obstacle = graph_obstacle(config, self.groups, self.config.cuda_graphs, attention)
        if obstacle and on_cuda:
            logger.info("decode steps run without CUDA graphs: %s", obstacle)
        with inference_attention(attention):
            run_dynamic_engine(
                model,
                self._num_layers(),
                self._sampler(responses, sampling, on_token),
                self.tokenizer,
                self.groups,
                max_sequence_length=longest,
                max_requests=max_requests,
                block_size_tokens=block,
                buffer_size_gb=self._cache_gb(max_requests, longest, block),
                cuda_graphs=obstacle is None,
            )

    def _cache_gb(self, max_requests: int, longest: int, block: int) -> float:
        """Return the size of the key/value cache in GiB: the recipe's, or what `max_requests` whole sequences take.

        With less than that (the recipe's, or on CUDA what is free) the engine pauses and evicts responses and computes
        them again later; one whole sequence must fit. Collective over the ranks of a replica, which must agree.

        Raises:
            UserError: it does not.
        """
        asked = self.config.kv_cache_gb
        least, most = self._sequences_gb(1, longest, block), self._sequences_gb(max_requests, longest, block)
        if isinstance(asked, float) and asked < least:
            raise UserError(
                f"rollout.kv_cache_gb={asked:g} cannot hold one response of {longest} tokens, prompt included, which "
                f"takes {least:.3g} GiB on each rank; raise it or set it to auto."
            )
        if isinstance(asked, float):
            return asked
        if asked is None or self.groups.device.type != "cuda":
            return most
        free = least_of_replica(free_device_gb(self.chunks[0].config, prefill_tokens(longest)), self.groups)
        if free < least:
            raise UserError(
                f"{free:.3g} GiB of the GPU are free for the key/value cache, and one response of {longest} tokens, "
                f"prompt included, takes {least:.3g} GiB: lower rollout.max_new_tokens, raise "
                "student.tensor_model_parallel_size, or set teacher.offload and training.offload_optimizer."
            )
        if free < most:
            logger.info("the key/value cache gets the %.3g GiB that are free, of %.3g wanted", free, most)
        return min(free, most)

    def _sequences_gb(self, sequences: int, longest: int, block: int) -> float:
        config = self.chunks[0].config
        heads = config.num_query_groups // self.groups.tp_size
        token_bytes = 2 * heads * config.kv_channels * self._num_layers()
        token_bytes *= torch.finfo(config.params_dtype).bits // 8
        return cache_bytes(sequences, longest, block, token_bytes) / 2**30

    def _num_layers(self) -> int:
        return sum(len(chunk.decoder.layers) for chunk in self.chunks)

    def _run_static(
        self, model: GPTModel, responses: list[Response], sampling: Sampling, on_token: OnToken | None
    ) -> None:
        cpu_compat.apply_inference()
        run_static_engine(model, self._sampler(responses, sampling, on_token), self.tokenizer, self.groups)

    def _sampler(self, responses: list[Response], sampling: Sampling, on_token: OnToken | None) -> Sampler:
        shared = (self.groups, self.tokenizer.vocab_size, self.endings, self.end)
        return Sampler(responses, self.tokenizer, sampling, *shared, on_token=on_token)

    def _as_rollouts(self, responses: list[Response], sampling: Sampling) -> Rollouts:
        stops = Stops.of(self.tokenizer, sampling.stop)
        return Rollouts(
            tokens=[r.start + r.tokens for r in responses],
            prompt_lengths=[len(r.prompt.tokens) for r in responses],
            prefix_lengths=[len(r.prefix) for r in responses],
            lengths=[len(r.start) + len(r.tokens) for r in responses],
            logprobs=[r.logprobs for r in responses],
            finish_reasons=[r.finish_reason or "" for r in responses],  # every one has a reason by now
            sample_ids=[r.sample_id for r in responses],
            prompts=[r.prompt for r in responses],
            texts=[self._text(r, stops) for r in responses],
        )

    def _text(self, response: Response, stops: Stops) -> str:
        if response.finish_reason == "stop":
            return stops.cut(self.tokenizer.decode_response, response.tokens)
        return self.tokenizer.decode_response(response.tokens)
