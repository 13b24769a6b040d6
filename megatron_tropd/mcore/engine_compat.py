"""Megatron-Core's inference engines, 0.16 to 0.19, with our Sampler in place of their own sampling.

Part of the compatibility layer: nothing else touches the engines' private parts. The engines keep scheduling, paging
and the forward passes; the controllers below only choose tokens and report which requests end.
"""

from __future__ import annotations

import copy
import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.engines import static_engine
from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from packaging.version import Version
from tqdm import tqdm

from megatron_tropd.mcore.compat import MEGATRON_VERSION
from megatron_tropd.mcore.decode_graphs import GraphedDecoding
from megatron_tropd.parallel.groups import any_rank

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

try:  # 0.17 and later
    from megatron.core.inference.config import InferenceConfig
except ImportError:
    InferenceConfig = None
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

MAX_PREFILL_TOKENS = 16384


class _TokenizerAdapter:
    """What Megatron's controllers ask of a tokenizer; texts are made elsewhere, once a response is whole."""

    def __init__(self, tokenizer: Any):
        self.eod = tokenizer.eos_id
        self.bos = tokenizer.bos_id
        self.vocab_size = tokenizer.vocab_size

    def detokenize(self, tokens: list[int], *args: Any, **kwargs: Any) -> str:
        return ""

    def tokenize(self, text: str) -> list[int]:
        raise NotImplementedError("requests are given as token ids")


class _DynamicController(TextGenerationController):
    """Takes the last tokens' logits of the active requests to the sampler; request ids are places in its responses."""

    sampler: Any = None

    def _dynamic_step_sample_bookkeeping(self) -> None:
        """Group the requests by their sampling parameters: the sampler has its own, and each list is a wait."""

    def _dynamic_step_sample_logits(self, logits: torch.Tensor | None = None) -> None:
        context = self.inference_wrapped_model.inference_context
        active = slice(context.paused_request_count, context.total_request_count)
        count = active.stop - active.start
        if logits is None:  # 0.18 and later keep them here; None but on the last stage
            logits = getattr(self, "_all_logits_cuda", None)
        if logits is not None:
            logits = logits.squeeze(0)[:count]  # the model materializes only the last tokens' logits
        rows = context.request_ids[active].tolist()
        tokens, ended = self.sampler.advance(logits, rows, context.get_active_sequence_lengths())
        self._sampled_tokens_cuda = tokens
        # Megatron ends a request when its token equals its termination id: set so where, and only where, it ends.
        if hasattr(context, "active_request_metadata"):  # 0.18 and later
            termination_ids = context.active_request_metadata["termination_id"][:count]
        else:
            termination_ids = self._request_metadata["termination_id"][active]
        ended = torch.tensor(ended, device=tokens.device)
        termination_ids.copy_(torch.where(ended, tokens, -1).to(termination_ids.dtype))


class _StaticController(TextGenerationController):
    """The same for the static engine, whose batch advances one position at a time, shortest prompts first."""

    sampler: Any = None
    position: int = 0  # the place in the sequences that the next tokens take

    def sample_from_logits(
        self, last_token_logits: torch.Tensor, *args: Any, generation_started: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        started = generation_started.tolist()
        rows = [i for i, r in enumerate(self.sampler.responses) if started[i] and r.finish_reason is None]
        tokens = torch.full((last_token_logits.size(0),), self.tokenizer.eod, device=last_token_logits.device)
        if rows:  # ended rows repeat EOS until all are done
            places = torch.tensor(rows, device=tokens.device)
            positions = torch.full_like(places, self.position)
            tokens[places] = self.sampler.advance(last_token_logits[places], rows, positions)[0]
        self.position += 1
        return tokens


def run_dynamic_engine(
    model: torch.nn.Module,
    num_layers: int,
    sampler: Any,
    tokenizer: Any,
    groups: Any,
    *,
    max_sequence_length: int,
    max_requests: int,
    block_size_tokens: int,
    buffer_size_gb: float,
    cuda_graphs: bool = False,
) -> None:
    """Let Megatron's dynamic engine complete all of `sampler.responses`; collective over the model's ranks.

    The paged key/value cache and the CUDA graphs of decode steps live for this call only.
    """
    sizes = {
        "max_sequence_length": max_sequence_length,
        "max_requests": max_requests,
        "block_size_tokens": block_size_tokens,
        "buffer_size_gb": buffer_size_gb,
        "max_tokens": prefill_tokens(max_sequence_length),
        "pg_collection": groups.collection,
    }
    context = _dynamic_context(model.config, num_layers, groups, sizes)
    graphed = GraphedDecoding(model, context) if cuda_graphs else None
    engine = _dynamic_engine(graphed or model, context, tokenizer, groups, sizes)
    engine.controller.sampler = sampler
    if groups.device.type == "cpu":
        context.memory_buffer.zero_()  # uninitialised memory may hold NaN, which no attention mask hides
    try:
        _complete(engine, sampler, groups)
    finally:
        if graphed is not None:
            graphed.release()
        _free(engine)


def prefill_tokens(max_sequence_length: int) -> int:
    """Return how many tokens a step of the dynamic engine may process.

    Megatron pads a step's tokens to multiples of its rounder, and writes as many: its buffers must hold the last one.
    """
    return DynamicInferenceContext.round_up_tokens(max(MAX_PREFILL_TOKENS, max_sequence_length))


def _dynamic_context(config: Any, num_layers: int, groups: Any, sizes: dict[str, Any]) -> DynamicInferenceContext:
    if InferenceConfig is None:
        return DynamicInferenceContext(
            params_dtype=config.params_dtype,
            num_layers=num_layers,
            kv_channels=config.kv_channels,
            num_attention_heads=config.num_query_groups,
            **sizes,
        )
    # The samples of a prompt share the blocks that it fills: stored once, from 0.19 on computed once.
    inference_config = InferenceConfig(**sizes, enable_prefix_caching=True)
    return DynamicInferenceContext(_context_config(config, num_layers, groups), inference_config)


def _dynamic_engine(
    model: torch.nn.Module,
    context: DynamicInferenceContext,
    tokenizer: Any,
    groups: Any,
    sizes: dict[str, Any],
) -> DynamicInferenceEngine:
    if InferenceConfig is None:
        wrapper_config = _wrapper_config(model, sizes["max_requests"], sizes["max_sequence_length"])
        wrapper = GPTInferenceWrapper(model, wrapper_config, context)
        controller = _DynamicController(wrapper, _TokenizerAdapter(tokenizer), pp_group=groups.pp)
        options = {"enable_cuda_graph": False, "random_seed": 0, "enable_chunked_prefill": False}
    else:
        wrapper = GPTInferenceWrapper(model, context)
        controller = _DynamicController(wrapper, _TokenizerAdapter(tokenizer))
        options = {}
    wrapper.prep_model_for_inference()
    controller.model_is_pipeline_parallel = False  # the sampler broadcasts tokens: logits need not leave the last stage
    return DynamicInferenceEngine(controller, context, **options)


def _complete(engine: DynamicInferenceEngine, sampler: Any, groups: Any) -> None:
    """Step the engine until all responses are complete."""
    for i, response in enumerate(sampler.responses):
        if response.finish_reason is None:
            engine.add_request(i, response.start, _params(num_tokens=response.budget))
    while _is_needed(engine, groups):
        if not engine.has_unfinished_requests():
            # Replicas that share experts pass tokens to one another: one without requests runs along with a dummy.
            filler = sampler.add_filler()
            engine.add_request(filler, sampler.responses[filler].start, _params(num_tokens=1))
        engine.step_modern()
    unfinished = [r.sample_id for r in sampler.responses if r.finish_reason is None]
    assert not unfinished, f"the engine dropped samples {unfinished[:5]}"


def _free(engine: DynamicInferenceEngine) -> None:
    """Release the key/value cache and all other tensors of a rollout.

    Engine and controller refer to one another, context and block allocator too: without this they would live until
    Python's cyclic collector runs, which does not know how much of the device's memory waits for it. Nothing uses them
    any more, so what they hold is taken from them whole.
    """
    for part in (engine.controller, engine.context, engine):
        vars(part).clear()


def _is_needed(engine: DynamicInferenceEngine, groups: Any) -> bool:
    """Whether a forward pass is due: for requests here, or on a replica that shares experts with this one."""
    here = engine.has_unfinished_requests()
    return here if groups.lockstep is None else any_rank(here, groups.lockstep)


def _context_config(config: Any, num_layers: int, groups: Any) -> Any:
    """Return a model's config as the engine's context of 0.17 and later must see it."""
    config = copy.copy(config)
    if Version("0.18") > MEGATRON_VERSION:  # it takes every stage to have as many layers
        config.num_layers = num_layers * groups.pp_size
    # Layers that train have their own dispatcher of tokens; the buffers of this one for inference are small.
    config.inference_moe_token_dispatcher_type = "nccl"
    return config


def run_static_engine(model: torch.nn.Module, sampler: Any, tokenizer: Any, groups: Any) -> None:
    """Let Megatron's static engine complete all of `sampler.responses` in one batch; collective."""
    responses = sampler.responses
    budget = max(r.budget for r in responses)
    longest = max(len(r.start) for r in responses) + budget
    if InferenceConfig is None:
        context = StaticInferenceContext(len(responses), longest)
        wrapper = GPTInferenceWrapper(model, _wrapper_config(model, len(responses), longest), context)
        controller = _StaticController(wrapper, _TokenizerAdapter(tokenizer), pp_group=groups.pp)
    else:
        context = StaticInferenceContext(len(responses), longest)
        context.config.pg_collection = groups.collection
        wrapper = GPTInferenceWrapper(model, context)
        controller = _StaticController(wrapper, _TokenizerAdapter(tokenizer))
    controller.sampler = sampler
    controller.position = min(len(r.start) for r in responses)
    options = (
        {"legacy": True}
        if "legacy" in inspect.signature(static_engine.StaticInferenceEngine.__init__).parameters
        else {}
    )
    engine = static_engine.StaticInferenceEngine(controller, max_batch_size=len(responses), **options)
    requests = [
        InferenceRequest(
            request_id=str(i),
            prompt="",
            prompt_tokens=list(response.start),
            sampling_params=_params(num_tokens=budget),
            status=Status.WAITING_IN_QUEUE,
        )
        for i, response in enumerate(responses)
    ]
    static_engine.tqdm = functools.partial(tqdm, disable=True)  # a bar of Megatron's own on every rank
    try:
        engine.generate(inference_requests=requests)
    finally:
        context.key_value_memory_dict.clear()  # as in `_free`: engine and controller may refer to one another


def _params(num_tokens: int) -> SamplingParams:
    return SamplingParams(num_tokens_to_generate=num_tokens, termination_id=-1, top_k=1)


def _wrapper_config(model: GPTModel, max_requests: int, max_sequence_length: int) -> Any:
    return InferenceWrapperConfig(
        hidden_size=model.config.hidden_size,
        params_dtype=model.config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=max_requests,
        inference_max_seq_length=max_sequence_length,
    )
