"""Everything a training run holds, built from its recipe in an order that finds mistakes before memory is spent.

Configurations, tokenizers and prompt files come first, then models and weights, then a checkpoint to resume from.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd import checkpoint
from megatron_tropd.config import Recipe
from megatron_tropd.convert import load_model_weights
from megatron_tropd.divergence import Divergence
from megatron_tropd.end_of_text import EndOfText
from megatron_tropd.evaluation import extract_answer, load_problems
from megatron_tropd.guidance import Guidance
from megatron_tropd.held_out import HeldOut, load_held_out
from megatron_tropd.layer_specs import uses_transformer_engine
from megatron_tropd.model import build_model
from megatron_tropd.objectives import Objective, build_objective
from megatron_tropd.packing import micro_batch_budget
from megatron_tropd.parallel import ParallelGroups, build_groups, on_rank_zero
from megatron_tropd.partition import Partition
from megatron_tropd.prompts import PromptSource, load_prompts
from megatron_tropd.recipe import save_recipe
from megatron_tropd.remote_teacher import RemoteTeacher
from megatron_tropd.rollout import RolloutEngine
from megatron_tropd.run_teacher import check_teacher, load_student_tokenizer, open_teacher
from megatron_tropd.teacher import TeacherHook
from megatron_tropd.tokenizer import Tokenizer
from megatron_tropd.train_step import Student, build_student
from megatron_tropd.types import Prompt, Sampling, UserError
from megatron_tropd.validation import validate
from megatron_tropd.verify import verify_before_training

logger = logging.getLogger(__name__)


@dataclass
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

    def shard(self, prompts: list[Prompt]) -> list[Prompt]:
        """Return this data-parallel rank's contiguous share of a step's prompts."""
        share = len(prompts) // self.groups.dp_size
        return prompts[self.groups.dp_rank * share : (self.groups.dp_rank + 1) * share]

    def sampling(self, step: int) -> Sampling:
        """Return how this step's responses are drawn."""
        rollout = self.recipe.rollout
        return Sampling(
            samples_per_prompt=rollout.samples_per_prompt if self.objective.needs_rollout else 1,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            stop=tuple(rollout.stop),
            seed=self.recipe.training.seed,
            step=step,
        )


def set_up(recipe: Recipe, groups: ParallelGroups, partition: Partition | None = None) -> Run:
    """Build a Run; collective over all processes of the student.

    Args:
        recipe: the whole of it.
        groups: the student's.
        partition: where the teacher has ranks of its own, which must come to `build_served_teacher`.

    Raises:
        UserError: something in the recipe or in the files that it names is wrong.
    """
    validate(recipe)
    _check_batch(recipe, groups)
    objective = build_objective(recipe.objective, recipe.guidance, recipe.training.seed)
    hf_path, hf_config, tokenizer = load_student_tokenizer(recipe)
    files = check_teacher(recipe, tokenizer) if objective.needs_teacher else None
    teacher_groups = build_groups(recipe.teacher, groups) if files and not partition else groups
    context = hf_config.max_position_embeddings
    max_prompt = _longest_prompt(recipe, context)
    prompts = load_prompts(recipe.data.prompts, tokenizer, max_prompt)
    problems = _load_problems(recipe, tokenizer, context)
    held_out_prompts = _load_held_out(recipe, tokenizer, max_prompt)
    guidance = _load_guidance(recipe, tokenizer, objective, prompts)
    longest_prompt = max(len(prompt.tokens) for prompt in prompts)
    _check_budget(recipe, longest_prompt)

    verify_before_training(recipe.student, groups, "student")
    fixed = {"deterministic_mode": recipe.training.deterministic}
    modules = build_model(hf_config, recipe.student, groups, role="student", **fixed)
    load_model_weights(modules, recipe.student, groups)
    student = build_student(modules, recipe.training, groups, tokenizer.vocab_size)
    end = student.end = files.end if files else EndOfText()
    teacher = None
    if files:
        models = (groups, teacher_groups, partition)
        teacher = open_teacher(recipe, *models, files, objective, tokenizer.vocab_size)
    divergences = _open_divergences(recipe, student, objective, teacher, held_out_prompts)
    student.divergence = divergences.get("objective")
    engine = RolloutEngine(modules, tokenizer, groups, recipe.rollout, max_sequence_length=context, end=end)
    source = PromptSource(prompts, seed=recipe.data.seed, shuffle=recipe.data.shuffle)
    held_out = _build_held_out(recipe, student, held_out_prompts, tokenizer, teacher, divergences.get("held_out"))
    folder = Path(recipe.logging.dir)
    state = _resume(recipe, groups, student, source, folder)
    return Run(
        recipe,
        folder,
        groups,
        tokenizer,
        objective,
        source,
        problems,
        held_out,
        guidance,
        student,
        teacher,
        engine,
        state,
        hf_path,
        micro_batch_budget(recipe, longest_prompt, uses_transformer_engine()),
    )


def pad_multiple(recipe: Recipe, groups: ParallelGroups) -> int:
    """Return what sequence lengths are rounded up to, so that both models can shard them."""
    return math.lcm(*(groups.token_multiple(model) for model in (recipe.student, recipe.teacher)))


def checkpoint_folder(recipe: Recipe) -> Path:
    """Return the folder of the run's checkpoints."""
    return Path(recipe.checkpoint.dir or Path(recipe.logging.dir) / "checkpoints")


def _check_batch(recipe: Recipe, groups: ParallelGroups) -> None:
    prompts = recipe.training.prompts_per_step
    if prompts % groups.dp_size:
        raise UserError(
            f"training.prompts_per_step={prompts} cannot be split over {groups.dp_size} data-parallel ranks "
            f"({groups.world_size} processes); use a multiple of {groups.dp_size}"
        )


def _check_budget(recipe: Recipe, longest: int) -> None:
    budget = recipe.training.max_tokens_per_micro_batch
    if isinstance(budget, int) and budget < longest + recipe.rollout.max_new_tokens:
        raise UserError(
            f"training.max_tokens_per_micro_batch={budget} cannot hold {longest} prompt tokens (the longest of "
            f"{recipe.data.prompts}) and rollout.max_new_tokens={recipe.rollout.max_new_tokens}; use at least "
            f"{longest + recipe.rollout.max_new_tokens}, or auto"
        )


def _longest_prompt(recipe: Recipe, context: int) -> int:
    room = context - recipe.rollout.max_new_tokens
    if room < 1:
        raise UserError(
            f"rollout.max_new_tokens={recipe.rollout.max_new_tokens} leaves no room for a prompt in the student's "
            f"context of {context} tokens (max_position_embeddings); lower it below {context}"
        )
    return min(room, recipe.data.max_prompt_tokens or room)


def _load_guidance(recipe: Recipe, tokenizer: Tokenizer, objective: Objective, prompts: list[Prompt]) -> Guidance:
    guidance = Guidance(
        recipe.guidance,
        recipe.training.steps,
        tokenizer,
        max_tokens=recipe.rollout.max_new_tokens,
        whole_response=not objective.needs_rollout,
        enabled=objective.uses_guidance,
    )
    guidance.check(prompts)
    return guidance


def _load_problems(recipe: Recipe, tokenizer: Tokenizer, context: int) -> list[Prompt]:
    config = recipe.evaluation
    if not config.problems:
        return []
    extract_answer("", config.answer_pattern)  # refuses a pattern that does not compile
    return load_problems(config.problems, tokenizer, context - (config.max_new_tokens or recipe.rollout.max_new_tokens))


def _load_held_out(recipe: Recipe, tokenizer: Tokenizer, max_prompt: int) -> list[Prompt]:
    config = recipe.evaluation
    if not config.held_out:
        return []
    return load_held_out(config.held_out, config.held_out_responses, tokenizer, max_prompt)


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
    weight = teacher.output_weight(student.vocabulary_width)
    shared = (weight, student.groups.tp, student.vocab_size)
    config, found = recipe.objective, {}
    if kinds["objective"]:
        options = {"beta": config.beta, "temperature": config.temperature, "implementation": config.kernel}
        found["objective"] = Divergence(kinds["objective"], *shared, **options, end=student.end)
    if kinds["held_out"]:
        found["held_out"] = Divergence(kinds["held_out"], *shared, implementation=config.kernel, end=student.end)
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


def _resume(
    recipe: Recipe, groups: ParallelGroups, student: Student, source: PromptSource, folder: Path
) -> checkpoint.TrainingState:
    """Load the newest whole checkpoint, or start anew; write the resolved recipe into the run's folder."""
    checkpoints = checkpoint_folder(recipe)
    found = [checkpoint.newest(checkpoints) if groups.rank == 0 and recipe.checkpoint.resume else None]
    dist.broadcast_object_list(found, src=0)

    def write_recipe() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, folder / "recipe.yaml")

    on_rank_zero(write_recipe)
    state = checkpoint.TrainingState(step=0, cursor=source.state_dict(), layout=checkpoint.layout_of(groups))
    if found[0] is not None:
        state = checkpoint.load(found[0], student)
        source.load_state_dict(state.cursor)
        state.layout = checkpoint.layout_of(groups)
        logger.warning("resuming from %s after step %d", found[0], state.step)
    student.gather_parameters()
    student.leave_device()
    return state
