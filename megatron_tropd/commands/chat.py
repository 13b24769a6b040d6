"""Runs `chat`: finds the model that a folder holds, reads lines, and prints the replies while they are drawn.

Replies alone go to standard output; the prompt sign, notes and numbers go to standard error. Rank 0 reads and prints.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tropd.config import Recipe
from megatron_tropd.errors import UserError
from megatron_tropd.recipe import load_recipe
from megatron_tropd.system.launcher import launcher_rank, launcher_world_size
from megatron_tropd.validation import check_layout

if TYPE_CHECKING:
    from megatron_tropd.evaluation.chat import Conversation

_KINDS = "give a run's folder, a Megatron checkpoint or a Hugging Face folder"
_HOURS = 7 * 24  # how long the other ranks wait for a line
# A run's layout on one process, unless the command line says otherwise.
_ONE_PROCESS = (
    *(f"student.{kind}_parallel_size=1" for kind in ("tensor_model", "pipeline_model", "context", "expert_model")),
    *("student.virtual_pipeline_model_parallel_size=null", "student.expert_tensor_parallel_size=null"),
    *("student.num_layers_in_first_pipeline_stage=null", "student.num_layers_in_last_pipeline_stage=null"),
    "student.sequence_parallel=false",
)
# A terminal would obey control characters of a reply; their pictures say which they were.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}


@dataclass
class Source:
    """Where the weights are: a training checkpoint, perhaps of a run with others, or a folder of weights alone."""

    key: str  # hf_path or checkpoint
    weights: Path
    checkpoint: Path | None = None  # the training checkpoint, which holds a recipe
    run: Path | None = None  # the folder of its run's checkpoints


def chat(arguments: argparse.Namespace) -> None:
    """Talk with a model until the input ends."""
    source = _find(_folder(arguments), arguments.step, arguments.overrides)
    recipe = _recipe(source, arguments.overrides)
    check_layout("student", recipe.student)
    from megatron_tropd.evaluation.chat import Conversation
    from megatron_tropd.evaluation.generation import open_model
    from megatron_tropd.parallel.groups import from_rank_zero
    from megatron_tropd.rollout.decoding import make_sampling

    seed = recipe.training.seed if arguments.seed is None else arguments.seed
    own = {"max_new_tokens": arguments.max_new_tokens, "temperature": arguments.temperature}
    sampling = make_sampling(recipe.rollout, seed, samples_per_prompt=1, **own)
    recipe.training.timeout_minutes = _HOURS * 60
    terminal = Terminal()
    with open_model(recipe, "student") as model:
        # A run that goes on may have written another checkpoint since this rank looked.
        recipe.student.checkpoint = from_rank_zero(lambda: recipe.student.checkpoint)
        conversation = Conversation(model, sampling, arguments.system)
        conversation.engine = model.engine()
        log = logging.getLogger("megatron_tropd")
        log.setLevel(max(log.level, logging.WARNING))  # what kernels and engine tell would stand within the replies
        terminal.note(f"{recipe.student.checkpoint or recipe.student.hf_path}: {_commands(source)}")
        if conversation.is_plain:
            terminal.note("the tokenizer has no chat template: messages are plain text (tokenizer.chat_template=FILE)")
        with terminal.interruptible():
            _talk(conversation, source, terminal)


def _commands(source: Source) -> str:
    return "/reset, /step N, /quit" if source.run is not None else "/reset, /quit"


def _talk(conversation: Conversation, source: Source, terminal: Terminal) -> None:
    from megatron_tropd.evaluation.chat import Refused

    while (line := terminal.read()) is not None:
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/reset":
            conversation.reset()
            terminal.note("a new conversation")
        elif word == "/step":
            _change_step(conversation, source, rest.strip(), terminal)
        elif re.fullmatch(r"/[a-z]+", line):
            terminal.note(f"unknown command {word}: there are {_commands(source)}")
        elif line:
            try:
                with terminal.patient():
                    reply = conversation.ask(line, terminal.write if terminal.shows else None)
            except Refused as error:
                terminal.note(str(error))
                continue
            terminal.write("\n")
            terminal.note(reply.summary())


def _change_step(conversation: Conversation, source: Source, step: str, terminal: Terminal) -> None:
    """Read the weights of another checkpoint of the run; the conversation stays."""
    from megatron_tropd.parallel.groups import from_rank_zero

    def find() -> Path:
        if source.run is None:
            raise UserError(f"/step picks a checkpoint of a run, and {source.weights} belongs to none.")
        return _step_folder(source.run, step, "/step ") / "model"

    try:
        found = from_rank_zero(find)
    except UserError as error:
        return terminal.note(str(error))
    conversation.load(found)
    terminal.note(f"{found}: the conversation goes on")


class Terminal:
    """Reads lines and prints on rank 0; every rank gets the lines."""

    def __init__(self) -> None:
        self.shows = launcher_rank() == 0
        self._ends = False  # Ctrl-C came while a reply was drawn
        self._dims = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
        self._pictures = _PICTURES if sys.stdout.isatty() else {}
        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")

    def read(self) -> str | None:
        """Return the next line without blanks around it, None at the end of the input; collective."""
        from megatron_tropd.parallel.groups import from_rank_zero

        return from_rank_zero(self._line)

    def _line(self) -> str | None:
        if self._ends:
            return None
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                with contextlib.suppress(ImportError):
                    import readline  # noqa: F401  (lets `input` edit the line)
                return input("> ").strip()
            line = sys.stdin.readline()
            return line.strip() if line else None
        except EOFError:
            self.write("\n")
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher passes on what the terminal sent already
            self.write("\n")
        return None

    def write(self, text: str) -> None:
        """Print a piece of a reply."""
        if self.shows:
            print(text.translate(self._pictures), end="", flush=True)

    def note(self, text: str) -> None:
        """Print a dim line to standard error."""
        if self.shows:
            print(f"\033[2m{text}\033[0m" if self._dims else text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """End the context where Ctrl-C comes; rank 0 alone decides, and the others wait for what it sends."""
        faulthandler.unregister(signal.SIGINT)  # an imported library has it print the stack
        before = signal.getsignal(signal.SIGINT)
        if not self.shows:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            yield
        except KeyboardInterrupt:
            self.write("\n")
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def patient(self) -> Iterator[None]:
        """Let Ctrl-C wait for the end of the context where other ranks take part in it."""
        if not self.shows or launcher_world_size() == 1:
            yield
            return
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "_ends", True))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _folder(arguments: argparse.Namespace) -> Path:
    """Return the folder that the first word names, which `cli.py` takes for an override where it holds a `=`."""
    words = arguments.overrides
    if arguments.recipe is None and words and Path(words[0]).is_dir():
        arguments.recipe = words.pop(0)
    if arguments.recipe is None:
        raise UserError(f"chat needs a model: {_KINDS}.")
    if not Path(arguments.recipe).is_dir():
        raise UserError(f"chat: {arguments.recipe}: no such folder; {_KINDS}.")
    return Path(arguments.recipe)


def _find(folder: Path, step: int | None, overrides: list[str]) -> Source:
    """Tell what a folder holds; `step` picks one of a run's checkpoints.

    Raises:
        UserError: nothing that can be talked with, or no such checkpoint.
    """
    from megatron_tropd.models.manifest import MANIFEST
    from megatron_tropd.training.checkpoint import newest, step_folders

    if folder.name == "model" and (folder.parent / "recipe.yaml").is_file():
        folder = folder.parent
    is_checkpoint = (folder / "model" / MANIFEST).is_file()
    if not is_checkpoint and step is None:
        if (folder / MANIFEST).is_file():
            return Source("checkpoint", folder)
        if (folder / "config.json").is_file():
            return Source("hf_path", folder)
    checkpoints = folder.resolve().parent if is_checkpoint else folder
    if (folder / "recipe.yaml").is_file() and not is_checkpoint:
        configured = load_recipe(folder / "recipe.yaml", overrides).checkpoint.dir
        checkpoints = Path(configured or folder / "checkpoints")
    elif not step_folders(checkpoints):
        what = f"--step {step} picks a checkpoint of a run, and" if step is not None else "chat:"
        raise UserError(f"{what} {folder} is none; {_KINDS}.")
    if step is not None:
        chosen = _step_folder(checkpoints, str(step), "--step ")
    else:
        found = folder if is_checkpoint else newest(checkpoints)
        if found is None:
            raise UserError(f"{checkpoints} holds no whole checkpoint; the run saves one at checkpoint.save_interval.")
        chosen = _whole(found)
    return Source("checkpoint", chosen / "model", chosen, checkpoints)


def _step_folder(checkpoints: Path, step: str, option: str) -> Path:
    """Return a run's checkpoint after `step`; UserError with the steps that exist, where there is none."""
    from megatron_tropd.training.checkpoint import numbered_folders

    folders = dict(reversed(numbered_folders(checkpoints)))
    if not step.isdecimal() or int(step) not in folders:
        steps = ", ".join(map(str, folders)) or "none"
        raise UserError(f"{option}{step}: {checkpoints} has no such checkpoint; its steps are {steps}.")
    return _whole(folders[int(step)])


def _whole(checkpoint: Path) -> Path:
    from megatron_tropd.models.manifest import find_damage

    damage = find_damage(checkpoint)
    if damage is not None:
        raise UserError(f"{checkpoint} is damaged: {damage}. Take the checkpoint of another step.")
    return checkpoint


def _recipe(source: Source, overrides: list[str]) -> Recipe:
    """Return the recipe of the run that wrote the weights, or the defaults, with the student that is talked with."""
    if source.checkpoint is None:
        recipe = load_recipe(None, overrides)
    else:
        # The checkpoint's own folder holds tokenizer, template and end-of-text ids.
        own = ["tokenizer.path=null", "tokenizer.chat_template=null"]
        own += _ONE_PROCESS if launcher_world_size() == 1 else ()
        recipe = load_recipe(source.checkpoint / "recipe.yaml", [*own, *overrides])
    recipe.student.hf_path = recipe.student.checkpoint = None
    setattr(recipe.student, source.key, str(source.weights))
    return recipe
