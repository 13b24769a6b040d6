"""A model opened for generation alone, and responses written to a file that a later run completes.

with open_model(recipe, "teacher") as model:
    prompts = load_prompts(path, model.tokenizer, model.longest_prompt(sampling.max_new_tokens))
    write_responses(model.engine(), prompts, sampling, model.groups, "responses.jsonl")
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd import preflight
from megatron_tropd.config import ModelConfig, Recipe, RolloutConfig
from megatron_tropd.convert import check_model_files, load_model_weights, resolve_hf_path
from megatron_tropd.environment import gather
from megatron_tropd.errors import UserError
from megatron_tropd.metrics import read_records
from megatron_tropd.model import build_model, load_hf_config
from megatron_tropd.parallel import ParallelGroups
from megatron_tropd.process_groups import process_groups
from megatron_tropd.rollout import RolloutEngine
from megatron_tropd.tokenizer import Tokenizer, load_tokenizer
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

    def longest_prompt(self, max_new_tokens: int) -> int:
        """Return the tokens that a response of `max_new_tokens` leaves for the prompt; UserError if there are none."""
        room = self.hf_config.max_position_embeddings - max_new_tokens
        if room < 1:
            raise UserError(
                f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the {self.role}'s context of "
                f"{self.hf_config.max_position_embeddings} tokens (max_position_embeddings); lower it."
            )
        return room

    def engine(self) -> RolloutEngine:
        """Build the model, read its weights and return an engine over it; collective over all ranks."""
        chunks = build_model(self.hf_config, self.config, self.groups, training=False, role=self.role)
        load_model_weights(chunks, self.config, self.groups)
        # The engine's pipeline sends over NCCL's group of all ranks, which all must open together: later a replica
        # without prompts would stay away.
        dist.barrier()
        context = self.hf_config.max_position_embeddings
        return RolloutEngine(chunks, self.tokenizer, self.groups, self.rollout, max_sequence_length=context)


@contextlib.contextmanager
def open_model(recipe: Recipe, role: str) -> Iterator[OpenModel]:
    """Start the process groups of `recipe.student` or `recipe.teacher` and read its configuration and tokenizer."""
    config: ModelConfig = getattr(recipe, role)
    preflight.check(recipe, gather(), (role,))
    with process_groups(config, recipe.training.seed, timeout_minutes=recipe.training.timeout_minutes) as groups:
        hf_path = resolve_hf_path(config, role)
        check_model_files(config)
        tokenizer = load_tokenizer(recipe.tokenizer.path or hf_path, recipe.tokenizer.chat_template)
        yield OpenModel(role, config, recipe.rollout, groups, load_hf_config(hf_path), tokenizer)


def write_responses(
    engine: RolloutEngine,
    prompts: list[Prompt],
    sampling: Sampling,
    groups: ParallelGroups,
    output: str | Path,
    field: str = "response",
    batch_size: int = 256,
) -> int:
    """Append one line a response to `output`, {"id", "sample", field, "finish_reason", "length"}; collective.

    Prompts whose responses are all there already are passed over, so a killed run is completed by running it again.
    `batch_size` responses at a time on each data-parallel rank are generated and then written. Returns how many
    responses were written now.
    """
    per_prompt = sampling.samples_per_prompt
    finished = [_finished_ids(Path(output), per_prompt) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(finished, src=0)
    todo = [prompt for prompt in prompts if prompt.id not in finished[0]]
    chunk = max(1, batch_size // per_prompt) * groups.dp_size
    reports = dist.get_rank() == 0
    with tqdm(
        total=len(prompts), initial=len(prompts) - len(todo), desc="generate", unit="prompt", disable=not reports
    ) as bar:
        for start in range(0, len(todo), chunk):
            part = todo[start : start + chunk]
            mine = part[groups.dp_rank :: groups.dp_size]
            records = _records(engine.generate(mine, [[] for _ in mine], sampling), per_prompt, field)
            gathered: list[Any] = [None] * groups.dp_size
            dist.all_gather_object(gathered, records, group=groups.dp)
            if reports:
                _append(Path(output), [record for records in gathered for record in records])
            bar.update(len(part))
    return len(todo) * per_prompt


def _records(rollouts: Rollouts, per_prompt: int, field: str) -> list[dict[str, Any]]:
    return [
        {
            "id": prompt.id,
            "sample": rollouts.sample_ids[i] % per_prompt,
            field: rollouts.texts[i],
            "finish_reason": rollouts.finish_reasons[i],
            "length": rollouts.lengths[i] - rollouts.prompt_lengths[i] - rollouts.prefix_lengths[i],
        }
        for i, prompt in enumerate(rollouts.prompts)
    ]


def _finished_ids(output: Path, per_prompt: int) -> set[str]:
    """Return the ids with all their responses in `output`, after dropping what a killed run wrote by halves."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        return set()
    records = read_records(output)
    counts = Counter(record.get("id") for record in records)
    if any(count > per_prompt for count in counts.values()):
        raise UserError(
            f"{output} holds more than {per_prompt} responses of a prompt: it was written with other settings. Move it "
            "away, or give another output."
        )
    finished = {name for name, count in counts.items() if count == per_prompt}
    partial = output.with_name(output.name + ".partial")
    partial.write_text(_lines([record for record in records if record["id"] in finished]), encoding="utf-8")
    partial.replace(output)
    return finished


def _append(output: Path, records: list[dict[str, Any]]) -> None:
    with open(output, "a", encoding="utf-8") as file:
        file.write(_lines(records))


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
