"""The subject of a plan: two models, a recipe and a number of GPUs of one kind.

job = Job(student_config, teacher_config, recipe, gpus=8)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.config import Recipe
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.mcore.kv_cache import decode_sizes, layout_obstacle
from megatron_tropd.methods import METHODS, Method
from megatron_tropd.models.build import load_hf_config
from megatron_tropd.models.convert import resolve_hf_path
from megatron_tropd.parallel.layout import model_ranks
from megatron_tropd.parallel.packing import micro_batch_budget
from megatron_tropd.parallel.partition import has_dedicated_teacher, student_size, teacher_size
from megatron_tropd.planning.accelerator import Accelerator


@dataclass(frozen=True)
class Job:
    """Two models and a recipe on a number of GPUs; lengths are the longest that the recipe allows."""

    student: Any  # Hugging Face configs
    teacher: Any
    recipe: Recipe
    gpus: int
    prompt_tokens: int = 512
    fused: bool = True  # False: Megatron's local layers and torch's optimizer, as on a CPU
    gpu: Accelerator = field(default_factory=Accelerator)

    @property
    def sequence(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.recipe.rollout.max_new_tokens

    @property
    def apart(self) -> bool:
        """Whether the teacher has dedicated GPUs."""
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
        budget = micro_batch_budget(self.recipe, self.prompt_tokens, fused=self.fused)
        return budget or self.recipe.training.micro_batch_size * self.sequence

    @property
    def graphed(self) -> bool:
        """Whether decode steps are replayed from CUDA graphs."""
        rollout, stages = self.recipe.rollout, self.recipe.student.pipeline_model_parallel_size
        obstacle = layout_obstacle(rollout.cuda_graphs, stages, experts_of(self.student) is not None)
        return self.fused and obstacle is None and rollout.engine != "static"

    @property
    def captured_sizes(self) -> int:
        """How many batch sizes are captured."""
        return decode_sizes(self.requests) if self.graphed else 0

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


def job_of(recipe: Recipe, gpus: int, prompt_tokens: int, **options: Any) -> Job:
    """Return the job of a recipe, whose two models' config.json files are read; `options`: further fields of Job.

    Raises:
        UserError: a model's folder or checkpoint cannot be used.
    """
    student, teacher = (load_hf_config(resolve_hf_path(getattr(recipe, role), role)) for role in ("student", "teacher"))
    return Job(student, teacher, recipe, gpus, prompt_tokens, **options)
