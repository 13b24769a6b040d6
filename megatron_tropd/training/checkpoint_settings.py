"""Takes stop strings, template variables, date and dtype from a training checkpoint's recipe, to generate with it.

take_settings(recipe, "student")    # before sampling and tokenizer are made of the recipe
"""

from __future__ import annotations

import logging
from pathlib import Path

from megatron_tropd.config import Recipe
from megatron_tropd.models.auto_dtype import AUTO

logger = logging.getLogger(__name__)

# The folder of the checkpoint holds tokenizer, template and end-of-text ids; these three have no place in it.
_CARRIED = (("rollout", "stop"), ("tokenizer", "chat_template_kwargs"), ("tokenizer", "date"))


def take_settings(recipe: Recipe, role: str) -> None:
    """Fill what `recipe` leaves empty of stop strings, template variables and date from the checkpoint's own recipe.

    Responses to the same prompts then end where they did in the run that wrote the checkpoint. A dtype of `auto`
    becomes the one in which that run's student was trained.

    Args:
        recipe: changed where `<role>.checkpoint` is the `model/` of a training checkpoint.
        role: "student" or "teacher".
    """
    from omegaconf import OmegaConf

    checkpoint = getattr(recipe, role).checkpoint
    file = Path(checkpoint).resolve().parent / "recipe.yaml" if checkpoint else None
    if file is None or not file.is_file():
        return
    theirs = OmegaConf.load(file)
    for section, name in _CARRIED:
        value = OmegaConf.select(theirs, f"{section}.{name}")
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if value and not getattr(getattr(recipe, section), name):
            setattr(getattr(recipe, section), name, str(value) if name == "date" else value)
            logger.info("%s.%s=%s is taken from %s", section, name, value, file)
    dtype = OmegaConf.select(theirs, "student.dtype")
    if dtype and getattr(recipe, role).dtype == AUTO:
        getattr(recipe, role).dtype = dtype
        logger.info("%s.dtype=%s is taken from %s", role, dtype, file)
