"""What a plan is made for: two models, a recipe and a number of GPUs of a kind.

job = Job(student_config, teacher_config, recipe, gpus=8)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.layout import model_ranks
from megatron_tropd.objectives import METHODS, Method
from megatron_tropd.partition import has_dedicated_teacher, student_size, teacher_size


@dataclass(frozen=True)
class Accelerator:
    """What a GPU can do; the defaults are an H100's, at the shares that Megatron reaches in practice."""

    memory_gb: float = 80.0
    reserve_gb: float = 4.0  # CUDA context, NCCL, fragmentation
    flops: float = 989e12 * 0.4  # dense bf16, reached in large matrix products of training
    bandwidth: float = 3.35e12 * 0.7  # bytes a second, reached while decoding

    @property
    def room_gb(self) -> float:
        """What a plan may fill."""
        return self.memory_gb - self.reserve_gb


@dataclass(frozen=True)
class Job:
    """Two models and a recipe on a number of GPUs; lengths are the longest that the recipe allows."""

    student: Any  # Hugging Face configs
    teacher: Any
    recipe: Recipe
    gpus: int
    prompt_tokens: int = 512
    fused: bool = True  # False: Megatron's local layers and torch's optimizer, as on a CPU

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.recipe.rollout.max_new_tokens

    @property
    def apart(self) -> bool:
        """Whether the teacher has GPUs of its own."""
        return has_dedicated_teacher(self.recipe)

    def gpus_of(self, role: str) -> int:
        """GPUs of the student or the teacher: all, or each its own."""
        if not self.apart:
            return self.gpus
        return teacher_size(self.recipe.teacher) if role == "teacher" else student_size(self.recipe, self.gpus)

    def replicas(self, role: str) -> int:
        """Data-parallel size of the student or the teacher."""
        return self.gpus_of(role) // model_ranks(getattr(self.recipe, role))

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch, padding included, before context parallelism splits them."""
        training = self.recipe.training
        return training.max_tokens_per_micro_batch or training.micro_batch_size * self.sequence

    @property
    def requests(self) -> int:
        """Responses that a student replica writes at the same time."""
        return min(self.rows, self.recipe.rollout.max_batch_size)

    @property
    def method(self) -> Method:
        """What the recipe's objective is."""
        return METHODS.get(self.recipe.objective.name, Method())

    @property
    def rows(self) -> int:
        """Sequences of a student replica in a step."""
        rollout = self.recipe.rollout
        return self.recipe.training.prompts_per_step * rollout.samples_per_prompt // self.replicas("student")
