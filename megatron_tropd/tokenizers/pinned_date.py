"""The current date for chat templates: the same on all ranks of a job and in all restarts of a run.

pin_date(recipe.tokenizer, tokenizer, lambda: checkpoint.newest(folder))
"""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.config import TokenizerConfig
from megatron_tropd.tokenizers.base import Tokenizer

logger = logging.getLogger(__name__)


def pin_date(config: TokenizerConfig, tokenizer: Tokenizer, newest: Callable[[], Path | None] = lambda: None) -> None:
    """Set `config.date`, if the template asks for the date and none is given; collective over all ranks.

    It is the date of the newest checkpoint's recipe, else rank 0's today, so that a run that continues on another day
    trains on the same prompts.

    Args:
        config: `tokenizer.*`; changed where the date is used.
        tokenizer: renders with that date from here on.
        newest: finds the checkpoint to continue from; called on rank 0 only.
    """
    if not tokenizer.uses_date or config.date is not None:
        return
    date: list[Any] = [None]
    if dist.get_rank() == 0:
        date[0] = _date_of(newest()) or datetime.date.today().isoformat()
    dist.broadcast_object_list(date, src=0)
    config.date = date[0]
    tokenizer.set_date(config.date)
    logger.info("the chat template asks for the date: %s is used throughout (tokenizer.date)", config.date)


def _date_of(checkpoint: Path | None) -> str | None:
    """Return the date of a checkpoint's recipe, None where it has none."""
    from omegaconf import OmegaConf

    if checkpoint is None or not (checkpoint / "recipe.yaml").exists():
        return None
    date = OmegaConf.select(OmegaConf.load(checkpoint / "recipe.yaml"), "tokenizer.date")
    return None if date is None else str(date)
