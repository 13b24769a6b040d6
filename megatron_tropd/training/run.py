"""Builds everything that a training run needs from its recipe, in an order that finds mistakes before memory is spent.

Configurations, tokenizers and prompt files come first, then models and weights, then a checkpoint to resume from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_tropd.config import Recipe
from megatron_tropd.mcore.layer_specs import uses_transformer_engine
from megatron_tropd.models.build import build_model
from megatron_tropd.models.convert import load_model_weights
from megatron_tropd.models.verify import verify_before_training
from megatron_tropd.numbers.finite_weights import check_loaded
from megatron_tropd.objective.divergence import Divergence
from megatron_tropd.objective.objectives import Objective, build_objective
from megatron_tropd.parallel.groups import ParallelGroups, build_groups
from megatron_tropd.parallel.packing import micro_batch_budget
from megatron_tropd.parallel.partition import Partition
from megatron_tropd.prompts.guidance import Guidance
from megatron_tropd.prompts.source import PromptSource
from megatron_tropd.rollout.decoding import make_sampling
from megatron_tropd.rollout.endings import find_endings
from megatron_tropd.rollout.engine import RolloutEngine
from megatron_tropd.teacher.hook import TeacherHook
from megatron_tropd.teacher.remote import RemoteTeacher
from megatron_tropd.tokenizers.end_of_text import EndOfText
from megatron_tropd.tokenizers.pinned_date import pin_date
from megatron_tropd.tokenizers.tokenizer import Tokenizer
from megatron_tropd.training import checkpoint
from megatron_tropd.training.held_out import HeldOut
from megatron_tropd.training.resume import Start, prepare, restore
from megatron_tropd.training.run_data import load_run_data
from megatron_tropd.training.run_teacher import check_teacher, load_student_tokenizer, open_teacher
from megatron_tropd.training.student import Student, build_student
from megatron_tropd.types import Prompt, Sampling, UserError
from megatron_tropd.validation import validate


@dataclass(kw_only=True)
class Run:
    """The stages of one run, ready to go."""

    recipe: Recipe
    folder: Path
    groups: ParallelGroups
    tokenizer: Tokenizer
    objective: Objective
    source: PromptSource
    problems: list[Prompt]
    held_out: HeldOut | None
    guidance: Guidance
    student: Student
    teacher: TeacherHook | RemoteTeacher | None
    engine: RolloutEngine
    state: checkpoint.TrainingState
    hf_path: Path
    max_tokens: int | None  # of a packed micro-batch; None: padded rows

    @property
    def reports(self) -> bool:
        """Whether this rank writes metrics and progress."""
        return self.groups.is_reporter

    @property
    def pad_multiple(self) -> int:
        """Sequence lengths are rounded up to it."""
        return pad_multiple(self.recipe, self.groups)

    @property
    def row_multiple(self) -> int:
        """Batches are filled up to a multiple of it: micro-batches, interleaved in groups of the pipeline's size."""
        return self.recipe.training.micro_batch_size * self.groups.micro_batch_multiple

    def draw(self, count: int) -> list[Prompt]:
        """Draw the next `count` prompts and return this data-parallel rank's contiguous share, tokenized."""
        return self.source.next(count, self.groups.dp_rank, self.groups.dp_size)

    def sampling(self, step: int) -> Sampling:
        """Return how this step's responses are drawn."""
        samples = None if self.objective.needs_rollout else 1
        # Without rollouts nothing follows a response that was cut and has no EOS.
        longest = None if self.objective.needs_rollout else 0
        own = {"samples_per_prompt": samples, "max_new_tokens": longest}
        return make_sampling(self.recipe.rollout, self.recipe.training.seed, step, **own)

    def finish_folder(self, folder: Path) -> None:
        """Let the Hugging Face folder of a checkpoint tokenize and end responses as the run does."""
        self.engine.endings.finish_folder(folder, self.recipe, self.tokenizer)


def set_up(
    recipe: Recipe, groups: ParallelGroups, partition: Partition | None = None, start: Start | None = None
) -> Run:
    """Build a Run; collective over all processes of the student.

    Args:
        recipe, groups: the whole of it; the student's.
        partition: where the teacher has dedicated ranks, which must call `build_served_teacher`.
        start: from `resume.prepare`, which is called if it is None.

    Raises:
        UserError: something in the recipe or in the files that it names is wrong.
    """
    start = start or prepare(recipe, groups, partition=partition)
    validate(recipe)
    _check_batch(recipe, groups)
    training, samples = recipe.training, recipe.rollout.samples_per_prompt
    objective = build_objective(recipe.objective, recipe.guidance, training.seed, samples, training.steps)
    hf_path, hf_config, tokenizer = load_student_tokenizer(recipe)
    pin_date(recipe.tokenizer, tokenizer, lambda: start.checkpoint)
    files = check_teacher(recipe, tokenizer) if objective.needs_teacher else None
    endings = files.endings if files else find_endings(recipe, "student", tokenizer)
    teacher_groups = build_groups(recipe.teacher, groups) if files and not partition else groups
    context = hf_config.max_position_embeddings
    data = load_run_data(recipe, tokenizer, endings, objective, context)

    verify_before_training(recipe.student, groups, "student")
    fixed = {"deterministic_mode": recipe.training.deterministic}
    modules = build_model(hf_config, recipe.student, groups, role="student", **fixed)
    load_model_weights(modules, recipe.student, groups)
    student = build_student(modules, recipe.training, groups, tokenizer.vocab_size)
    student.end = endings.end_of_text() if files else EndOfText()
    teacher = None
    if files:
        teacher = open_teacher(recipe, groups, teacher_groups, partition, files, objective, tokenizer.vocab_size)
    divergences = _open_divergences(recipe, student, objective, teacher, data.held_out)
    student.divergence = divergences.get("objective")
    engine = RolloutEngine(modules, tokenizer, groups, recipe.rollout, max_sequence_length=context, endings=endings)
    held_out = _build_held_out(recipe, student, data.held_out, tokenizer, teacher, divergences.get("held_out"))
    state = restore(recipe, groups, student, data.source, start)
    check_loaded(modules, recipe.student, "student")
    return Run(
        recipe=recipe,
        folder=Path(recipe.logging.dir),
        groups=groups,
        tokenizer=tokenizer,
        objective=objective,
        source=data.source,
        problems=data.problems,
        held_out=held_out,
        guidance=data.guidance,
        student=student,
        teacher=teacher,
        engine=engine,
        state=state,
        hf_path=hf_path,
        max_tokens=micro_batch_budget(recipe, data.longest_prompt, uses_transformer_engine()),
    )


def pad_multiple(recipe: Recipe, groups: ParallelGroups) -> int:
    """Return what sequence lengths are rounded up to, so that both models can shard them."""
    return math.lcm(*(groups.token_multiple(model) for model in (recipe.student, recipe.teacher)))


def _check_batch(recipe: Recipe, groups: ParallelGroups) -> None:
    prompts = recipe.training.prompts_per_step
    if prompts % groups.dp_size:
        raise UserError(
            f"training.prompts_per_step={prompts} cannot be split over {groups.dp_size} data-parallel ranks "
            f"({groups.world_size} processes); use a multiple of {groups.dp_size}"
        )


def _open_divergences(
    recipe: Recipe,
    student: Student,
    objective: Objective,
    teacher: TeacherHook | RemoteTeacher | None,
    held_out: list[Prompt],
) -> dict[str, Divergence]:
    """Return the divergences over the whole vocabulary that the run measures, of one output layer of the teacher's."""
    if held_out and teacher is None:
        raise UserError(
            f"evaluation.held_out measures the divergence from a teacher, and objective.name={recipe.objective.name} "
            "has none; remove the key."
        )
    kinds = {"objective": objective.divergence, "held_out": "forward_kl" if held_out else None}
    if not any(kinds.values()):
        return {}
    assert teacher is not None  # objectives without one were refused, or measure nothing
    weight = teacher.output_weight(student.vocabulary_width)
    config = recipe.objective
    divergence = partial(
        Divergence,
        teacher_weight=weight,
        group=student.groups.tp,
        vocab_size=student.vocab_size,
        implementation=config.kernel,
        end=student.end,
    )
    found: dict[str, Divergence] = {}
    if kinds["objective"]:
        found["objective"] = divergence(kinds["objective"], beta=config.beta, temperature=config.temperature)
    if kinds["held_out"]:
        found["held_out"] = divergence(kinds["held_out"])
    return found


def _build_held_out(
    recipe: Recipe,
    student: Student,
    prompts: list[Prompt],
    tokenizer: Tokenizer,
    teacher: TeacherHook | RemoteTeacher | None,
    divergence: Divergence | None,
) -> HeldOut | None:
    if divergence is None:
        return None
    assert teacher is not None  # the divergence is from it
    return HeldOut(
        prompts,
        tokenizer,
        student,
        teacher,
        divergence,
        micro_batch_size=recipe.training.micro_batch_size,
        max_response_tokens=recipe.rollout.max_new_tokens,
        pad_multiple=pad_multiple(recipe, student.groups),
    )
