"""A model opened for generation alone, and responses written to a file that a later run completes.

with open_model(recipe, "teacher") as model:
    prompts = load_prompts(path, model.tokenizer, model.longest_prompt(sampling.max_new_tokens))
    write_responses(model.engine(), prompts, sampling, model.groups, "responses.jsonl")
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.config import ModelConfig, Recipe, RolloutConfig
from megatron_tropd.errors import UserError
from megatron_tropd.machine import preflight
from megatron_tropd.machine.environment import gather
from megatron_tropd.models.auto_dtype import resolve_dtypes
from megatron_tropd.models.build import build_model, load_hf_config
from megatron_tropd.models.convert import check_model_files, load_model_weights, resolve_hf_path
from megatron_tropd.numbers.finite_weights import check_loaded
from megatron_tropd.numbers.guard import check_responses
from megatron_tropd.parallel.groups import ParallelGroups, from_rank_zero
from megatron_tropd.parallel.process_groups import process_groups
from megatron_tropd.prompts.fingerprint import digest_of, model_digest, tokenizer_digest
from megatron_tropd.prompts.responses_file import Origin, append, finished_ids, make_folder, prepare_file
from megatron_tropd.rollout.endings import Endings, find_endings
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.system.run_lock import RunLock
from megatron_tropd.tokenizers.pinned_date import pin_date
from megatron_tropd.tokenizers.tokenizer import Tokenizer, check_vocabulary, open_tokenizer
from megatron_tropd.types import Prompt, Rollouts, Sampling


@dataclass
class OpenModel:
    """A model's configuration and tokenizer; its weights are read by `engine()`, after the prompts were checked."""

    role: str
    config: ModelConfig
    rollout: RolloutConfig
    groups: ParallelGroups
    hf_config: Any
    tokenizer: Tokenizer
    endings: Endings
    tokenizer_path: Path
    chat_template: str | None = None

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Return the tokens that a response of `max_new_tokens` leaves for the prompt; UserError if there are none."""
        room = self.hf_config.max_position_embeddings - max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {self.role}'s context of "
                f"{self.hf_config.max_position_embeddings} tokens (max_position_embeddings); lower it."
            )
        return room

    def digest(self) -> str:
        """Return a digest of weights, tokenizer, end ids and template: what tells responses apart."""
        weights = model_digest(self.config.hf_path, self.config.checkpoint)
        ends = sorted(self.endings.eos | self.endings.stop_ids)
        template = self.tokenizer.template
        variables = None if template is None else [template.kwargs, template.date]
        return digest_of([weights, tokenizer_digest(self.tokenizer_path, self.chat_template), ends, variables])

    def engine(self) -> RolloutEngine:
        """Build the model, read its weights and return an engine over it; collective over all ranks."""
        chunks = build_model(self.hf_config, self.config, self.groups, training=False, role=self.role)
        load_model_weights(chunks, self.config, self.groups)
        check_loaded(chunks, self.config, self.role)
        # The engine's pipeline sends over NCCL's group of all ranks, which all must open together: later a replica
        # without prompts would stay away.
        dist.barrier()
        context = self.hf_config.max_position_embeddings
        return RolloutEngine(
            chunks, self.tokenizer, self.groups, self.rollout, max_sequence_length=context, endings=self.endings
        )


@contextlib.contextmanager
def open_model(recipe: Recipe, role: str) -> Iterator[OpenModel]:
    """Start the process groups of `recipe.student` or `recipe.teacher` and read its configuration and tokenizer."""
    config: ModelConfig = getattr(recipe, role)
    preflight.check(recipe, gather(), (role,))
    training = recipe.training
    with process_groups(config, training.seed, timeout_minutes=training.timeout_minutes, role=role) as groups:
        resolve_dtypes(recipe)
        hf_path = resolve_hf_path(config, role)
        hf_config = load_hf_config(hf_path)
        check_model_files(config)
        tokenizer = open_tokenizer(recipe.tokenizer, config, hf_path, role)
        check_vocabulary(tokenizer, hf_config, role)
        pin_date(recipe.tokenizer, tokenizer)
        endings = find_endings(recipe, role, tokenizer)
        path, template = Path(recipe.tokenizer.path or hf_path), recipe.tokenizer.chat_template
        yield OpenModel(role, config, recipe.rollout, groups, hf_config, tokenizer, endings, path, template)


def write_responses(
    engine: RolloutEngine,
    prompts: list[Prompt],
    sampling: Sampling,
    groups: ParallelGroups,
    output: str | Path,
    field: str = "response",
    batch_size: int = 256,
    model: str = "",
    role: str = "student",
) -> int:
    """Append {"id", "sample", field, "finish_reason", "length", "digests"} per response to `output`; collective.

    Prompts whose responses are complete are skipped, so a killed run is completed by running it again.
    `batch_size` responses at a time on each data-parallel rank are generated and then written. `model` is the digest
    of the model, see `OpenModel.digest`; `role` names it. Returns how many responses were written now.

    Raises:
        UserError: `output` holds anything but responses to these prompts by the same model and sampling, or responses
            were drawn from logits that are not finite.
    """
    origin = Origin(model, sampling)
    with RunLock() as lock:
        return _complete_file(engine, prompts, origin, groups, Path(output), field, batch_size, role, lock)


def _complete_file(
    engine: RolloutEngine,
    prompts: list[Prompt],
    origin: Origin,
    groups: ParallelGroups,
    output: Path,
    field: str,
    batch_size: int,
    role: str,
    lock: RunLock,
) -> int:
    sampling, per_prompt = origin.sampling, origin.sampling.samples_per_prompt

    def prepare() -> set[str]:
        make_folder(output)
        lock.take_file(output)
        return prepare_file(output, prompts, origin, field)

    finished = from_rank_zero(prepare)
    todo = [prompt for prompt in prompts if prompt.id not in finished]
    chunk = max(1, batch_size // per_prompt) * groups.dp_size
    reports = dist.get_rank() == 0
    with tqdm(
        total=len(prompts), initial=len(prompts) - len(todo), desc="generate", unit="prompt", disable=not reports
    ) as bar:
        for start in range(0, len(todo), chunk):
            part = todo[start : start + chunk]
            mine = part[groups.dp_rank :: groups.dp_size]
            rollouts = engine.generate(mine, [[] for _ in mine], sampling)
            check_responses(rollouts, role)
            records = _records(rollouts, origin, field)
            gathered: list[Any] = [None] * groups.dp_size
            dist.all_gather_object(gathered, records, group=groups.dp)
            if reports:
                append(output, [record for records in gathered for record in records])
            bar.update(len(part))
    return len(todo) * per_prompt


def unanswered(
    prompts: list[Prompt], sampling: Sampling, output: str | Path, field: str = "response", model: str = ""
) -> list[Prompt]:
    """Return the prompts that `write_responses` would answer, or raise as it would; reads the file only, collective."""
    finished = from_rank_zero(lambda: finished_ids(output, prompts, Origin(model, sampling), field))
    return [prompt for prompt in prompts if prompt.id not in finished]


def _records(rollouts: Rollouts, origin: Origin, field: str) -> list[dict[str, Any]]:
    per_prompt = origin.sampling.samples_per_prompt
    return [
        {
            "id": prompt.id,
            "sample": rollouts.sample_ids[i] % per_prompt,
            field: rollouts.texts[i],
            "finish_reason": rollouts.finish_reasons[i],
            "length": rollouts.lengths[i] - rollouts.prompt_lengths[i] - rollouts.prefix_lengths[i],
            "digests": origin.digests(prompt),
        }
        for i, prompt in enumerate(rollouts.prompts)
    ]
