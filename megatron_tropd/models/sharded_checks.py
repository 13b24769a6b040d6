"""Compares a Megatron checkpoint's tensors with those that a model needs: names, full shapes, dtypes.

Megatron itself would ignore tensors that no parameter needs, and truncate or pad embeddings of another vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.tensor_dtypes import name_of, set_dtype
from megatron_tropd.mcore.compat import refusing_unreadable
from megatron_tropd.models.build import padded_vocab_size
from megatron_tropd.system.safe_pickles import check_folder

logger = logging.getLogger(__name__)

_MOST_TP = 512  # vocabularies may be padded for any tensor-parallel size up to it


def stored_tensors(directory: str | Path) -> dict[str, ShardedTensor]:
    """Return name, whole shape and dtype of a checkpoint's tensors.

    Raises:
        UserError: it cannot be read, or holds more than plain data.
    """
    check_folder(directory)
    with refusing_unreadable(directory):
        return dist_checkpointing.load_tensors_metadata(str(directory))


def common_dtype(stored: dict[str, ShardedTensor]) -> torch.dtype:
    """Return the dtype of most numbers."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in stored.values():
        counts[tensor.dtype] += math.prod(tensor.global_shape)
    return counts.most_common(1)[0][0]


def _asked_for(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from (part for part in nested_values(value.build()) if isinstance(part, ShardedTensor))
        elif isinstance(value, ShardedTensor):
            yield value


def check_stored(state: dict[str, Any], directory: str | Path, vocab_size: int | None) -> None:
    """Refuse a checkpoint whose tensors are not those of the model's sharded state; collective over all ranks.

    Args:
        state: this rank's, of every chunk.
        directory: the checkpoint.
        vocab_size: without padding; None where there is no embedding.

    Raises:
        UserError: on every rank, with the first tensor that is missing, of another shape, or left over.
    """
    stored = stored_tensors(directory)
    problem, asked = None, set()
    most = common_dtype(stored)
    rounded: dict[tuple[torch.dtype, torch.dtype], set[str]] = {}
    for tensor in _asked_for(state):
        asked.add(tensor.key)
        problem = problem or _misfit(tensor, stored.get(tensor.key), vocab_size)
        theirs, ours = getattr(stored.get(tensor.key), "dtype", most), tensor.dtype
        if theirs != most and torch.promote_types(theirs, ours) != ours:
            rounded.setdefault((theirs, ours), set()).add(tensor.key)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (problem, asked))
    problem = next((found for found, _ in everyone if found), None)
    left_over = sorted(stored.keys() - set().union(*(names for _, names in everyone)))
    if problem is None and left_over:
        problem = f"holds {len(left_over)} tensors that the model does not have, first {left_over[0]}"
    if problem is not None:
        raise UserError(
            f"{directory} {problem}; its hf/config.json, or hf_path's, is not of these weights. Convert the model "
            "again with its own config.json."
        )

    for (theirs, ours), keys in rounded.items():
        logger.warning(
            "%s: %d kinds of parameters of %s beside %s are rounded to %s, as transformers rounds them in that dtype",
            *(directory, len(keys), name_of(theirs), name_of(most), name_of(ours)),
        )


def _misfit(asked: ShardedTensor, stored: ShardedTensor | None, vocab_size: int | None) -> str | None:
    if stored is None:
        return f"lacks the tensor {asked.key}"
    theirs, ours = tuple(stored.global_shape), tuple(asked.global_shape)
    if theirs == ours or (asked.allow_shape_mismatch and _is_padding(theirs, ours, vocab_size)):
        return None
    return f"holds {asked.key} of shape {theirs}, expected {ours}"


def _is_padding(theirs: tuple[int, ...], ours: tuple[int, ...], vocab_size: int | None) -> bool:
    """Whether two embeddings differ in the padding of one vocabulary alone."""
    if vocab_size is None or theirs[1:] != ours[1:]:
        return False
    return theirs[0] in {padded_vocab_size(vocab_size, tp) for tp in range(1, _MOST_TP + 1)}


def take_stored_dtypes(chunks: list[torch.nn.Module], state: dict[str, Any], directory: str | Path) -> None:
    """Give each parameter the dtype in which the checkpoint stores it."""
    stored = stored_tensors(directory)
    parameters = {p.data_ptr(): p for chunk in chunks for p in chunk.parameters()}
    for value in nested_values(state):
        parameter = parameters.get(value.data.data_ptr()) if getattr(value, "data", None) is not None else None
        if parameter is not None and value.key in stored:
            set_dtype(parameter, stored[value.key].dtype)
