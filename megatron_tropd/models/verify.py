"""Verifies Megatron's layers against transformers': both are built from the files and compared in fp32.

The first and the last layers, one of each kind, the embedding and the output layer, in the model's own layout: cheap
for any size. All layers of a kind are the same code; that all weights arrived is for `hf_weights.find_difference`.
With a checkpoint, all layers are compared: what the converter wrote, with what transformers makes of the folder.

    print(verify_model("models/Llama-3.1-8B", recipe.student, groups))     # raises UserError where they differ
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config import ModelConfig
from megatron_tropd.errors import UserError
from megatron_tropd.huggingface.checks import expected_shapes
from megatron_tropd.huggingface.config import load_hf_config
from megatron_tropd.huggingface.experts import experts_of
from megatron_tropd.machine.host_memory import available_host_bytes
from megatron_tropd.mcore.compat import run_schedule
from megatron_tropd.mcore.output_hook import OutputHook
from megatron_tropd.models.build import build_model
from megatron_tropd.models.checks import UNEVEN_STAGES
from megatron_tropd.models.hf_weights import load_hf_weights
from megatron_tropd.models.reference import LOGITS_EVERY, compare_parts
from megatron_tropd.models.verdict import Verdict, judge
from megatron_tropd.models.weights_checkpoint import load_checkpoint_weights
from megatron_tropd.parallel.groups import ParallelGroups, all_shards
from megatron_tropd.system.launcher import launcher_local_world_size

BOUND = 2e-5  # of relative differences: rounding of fp32 stays below, every part left out is above
_TOKENS = 512
_LONGEST = 4160  # tokens, where the config has a window: up to 64 beyond one of 4096
_HEADROOM = 1.1  # of memory over the weights: activations, and fragments


def full_logits(
    chunks: list[torch.nn.Module], tokens: torch.Tensor, groups: ParallelGroups, vocab_size: int
) -> torch.Tensor | None:
    """Return the logits [b, s, vocab_size] of `tokens` [b, s] on the last stage, None on the others; collective."""
    kept: list[torch.Tensor] = []
    hook = OutputHook(chunks)

    def keep(logits: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:  # [s, b, V/tp]
        kept.append(torch.cat(all_shards(logits, groups.tp), dim=-1)[..., :vocab_size].transpose(0, 1).contiguous())
        return logits[..., :1]

    def forward_step(data_iterator: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Callable[..., None]]:
        rows = next(data_iterator)
        position_ids = torch.arange(rows.size(1), device=rows.device).expand_as(rows)
        with hook.armed(keep):
            output = model(rows, position_ids, None)
        return output, lambda output, non_loss_data=True: None

    microbatches = [tokens] * groups.micro_batch_multiple
    rows, length = tokens.shape
    try:
        with torch.no_grad():
            run_schedule(
                groups, forward_step, microbatches, chunks, length, rows, forward_only=True, collect_non_loss_data=True
            )
    finally:
        hook.remove()
    return kept[0] if kept else None


def verify_model(
    hf_path: str | Path,
    model: ModelConfig,
    groups: ParallelGroups,
    at_least: int = 2,
    bound: float = BOUND,
    checkpoint: str | Path | None = None,
) -> Verdict:
    """Compare a few layers, embedding and output layer with transformers'; collective, the same on every rank.

    Args:
        hf_path: the model's folder.
        model: its layout.
        groups: process groups of that layout.
        at_least: as many layers, the first and the last ones; more where the pipeline's stages or the kinds of layers
            are more.
        bound: largest relative difference of a part's result; rounding as large as transformers' own passes, too.
        checkpoint: compare all layers, with the weights of this checkpoint of the folder: transformers reads the
            folder by its own names, so that a layer in another's place shows.

    Raises:
        UserError: on every rank, where a part differs by more than rounding, or the host has too little memory.
    """
    hf_config = load_hf_config(hf_path)
    if checkpoint is not None:
        at_least = hf_config.num_hidden_layers
    layers = choose_layers(hf_config, at_least, groups.pp_size)
    few = truncate(hf_config, layers)
    _check_host_memory(hf_path, few, groups)
    tokens = sample_tokens(hf_config).to(groups.device)
    with _whole_float32():
        ours = _run_megatron(hf_path, few, layers, model, groups, tokens, checkpoint)
        found: tuple[str, Any] | None = None
        if groups.is_reporter:
            try:
                device = _reference_device(few, groups)
                found = ("parts", compare_parts(hf_path, few, layers, tokens, ours, device))
            except Exception as error:
                found = ("error", f"{type(error).__name__}: {error}")
    everyone: list[Any] = [None] * groups.world_size
    dist.all_gather_object(everyone, found)
    kind, parts = next(item for item in everyone if item is not None)
    if kind == "error":
        raise RuntimeError(f"transformers could not compute the layers of {hf_path}: {parts}")
    verdict = Verdict(parts, layers, hf_config.num_hidden_layers)
    problem = judge(verdict, bound)
    if problem is not None:
        raise UserError(f"{hf_path}: {problem}")
    return verdict


def verify_before_training(model: ModelConfig, groups: ParallelGroups, role: str) -> None:
    """Verify a model that is read from `hf_path`, unless `verify` is off, and log the result; collective."""
    if model.checkpoint is None and model.verify == "auto":
        assert model.hf_path is not None  # a recipe without either is refused before
        try:
            verdict = verify_model(model.hf_path, model, groups)
        except UserError as error:
            raise UserError(f"{error} {role}.verify=off leaves this comparison out.") from error
        if groups.rank == 0:  # of its part of the job: a teacher on dedicated ranks logs only errors
            print(f"{role}: {verdict}", file=sys.stderr, flush=True)


def choose_layers(hf_config: Any, at_least: int, stages: int) -> tuple[int, ...]:
    """Return numbers of layers: of the first and last ones, one of each kind, as many as the stages can share."""
    count = hf_config.num_hidden_layers
    experts = experts_of(hf_config)
    chosen = {0, count - 1}
    if experts is not None:
        chosen |= {experts.layers.index(kind) for kind in (True, False) if kind in experts.layers}
    wanted = math.ceil(max(at_least, len(chosen)) / stages) * stages
    wanted = min(wanted, count // stages * stages)
    for i in range(count):
        if len(chosen) >= wanted:
            break
        chosen.add(i)
        if len(chosen) < wanted:
            chosen.add(count - 1 - i)
    return tuple(sorted(chosen)[:wanted])


def truncate(hf_config: Any, layers: tuple[int, ...]) -> Any:
    """Return the config of a model of these layers alone."""
    few = copy.deepcopy(hf_config)
    experts = experts_of(hf_config)
    few.num_hidden_layers = len(layers)
    if getattr(hf_config, "layer_types", None):
        few.layer_types = [hf_config.layer_types[i] for i in layers]
    if hf_config.model_type == "qwen3_moe":
        assert experts is not None  # this family's
        few.decoder_sparse_step = 1
        few.mlp_only_layers = [place for place, i in enumerate(layers) if not experts.layers[i]]
    return few


def sample_tokens(hf_config: Any) -> torch.Tensor:
    """Return ids [s] spread like those of text: few are frequent, some repeat at once, the last ids occur.

    512 of them, or what the context holds; more where the config has an attention window, to reach beyond it.
    """
    window = getattr(hf_config, "sliding_window", None) or 0
    length = min(max(_TOKENS, min(window + 64, _LONGEST)), hf_config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    vocab = hf_config.vocab_size
    ids = (vocab ** torch.rand(length, generator=generator, dtype=torch.float64)).long() - 1  # Zipf's law
    ids[3::17] = ids[2::17][: len(ids[3::17])]
    ids[5::29] = vocab - 1 - ids[5::29]
    return ids.clamp(0, vocab - 1)


def _run_megatron(
    hf_path: str | Path,
    few: Any,
    layers: tuple[int, ...],
    model: ModelConfig,
    groups: ParallelGroups,
    tokens: torch.Tensor,
    checkpoint: str | Path | None,
) -> dict[str, torch.Tensor]:
    """Return what Megatron's parts make of `tokens` [s], on the host; whole on the reporting rank."""
    plain: dict[str, Any] = {**dict.fromkeys(UNEVEN_STAGES[:2]), **dict.fromkeys(UNEVEN_STAGES[2:], False)}
    plain |= {"virtual_pipeline_model_parallel_size": None, "fp8": None, "recompute": None, "context_parallel_size": 1}
    layout = replace(model, dtype="float32", sequence_parallel=False, **plain)
    single = replace(_whole_sequences(groups), virtual_pipeline_size=None)
    # Transformer Engine would multiply fp32 matrices with the 10-bit mantissas of TF32.
    chunks = build_model(few, layout, single, training=False, use_transformer_engine=False)
    if checkpoint is None:
        load_hf_weights(chunks, few, hf_path, single, layers)
    else:
        load_checkpoint_weights(chunks, checkpoint)
    ours: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # [s, b, h]
            ours[name] = hidden[:, 0].float().cpu()

        return hook

    if getattr(chunks[0], "embedding", None) is not None and single.is_first_stage:
        chunks[0].embedding.register_forward_hook(keep("embedding"))
    for layer in chunks[0].decoder.layers:
        layer.register_forward_hook(keep(str(layer.layer_number - 1)))
    if chunks[0].post_process:
        # The output layer treats every position alike: a few of them do.
        chunks[0].output_layer.register_forward_pre_hook(lambda module, args: (args[0][::LOGITS_EVERY], *args[1:]))
    logits = full_logits(chunks, tokens[None], single, few.vocab_size)
    if logits is not None:
        ours["logits"] = logits[0].cpu()
    if groups.pp_size > 1 and groups.tp_rank == groups.dp_rank == groups.cp_rank == 0:
        stages: list[Any] = [None] * groups.pp_size
        mine = {name: value for name, value in ours.items() if name != "logits"}
        dist.all_gather_object(stages, mine, group=groups.pp)
        for stage in stages:
            ours |= stage
    return ours


def _whole_sequences(groups: ParallelGroups) -> ParallelGroups:
    """Return the groups without context parallelism: every one of its ranks computes the same; collective."""
    if groups.cp_size == 1:
        return groups
    collection = copy.copy(groups.collection)
    alone = [[rank] for rank in range(groups.world_size)]
    collection.cp = dist.new_subgroups_by_enumeration(alone, timeout=groups.timeout)[0]
    collection.tp_cp = collection.tp
    return replace(groups, collection=collection)


@contextmanager
def _whole_float32() -> Iterator[None]:
    """Within the context torch does not shorten fp32 factors to TF32, which some containers make its default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_host_memory(hf_path: str | Path, few: Any, groups: ParallelGroups) -> None:
    """Refuse a comparison for which the host memory does not suffice, before anything is loaded; collective."""
    needed = reference_bytes(few)
    if groups.device.type == "cpu":
        needed += model_bytes(few) * launcher_local_world_size() // groups.mp.size()
    elif _reference_device(few, groups).type == "cuda":
        needed = 0
    numbers = torch.zeros(2, dtype=torch.float64, device=groups.device)
    if groups.is_reporter:
        numbers[0], numbers[1] = available_host_bytes(), needed
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    available, needed = numbers.tolist()
    if needed > available:
        raise UserError(
            f"{hf_path}: verification needs {needed / 1e9:.1f} GB of host memory, for {few.num_hidden_layers} layers "
            f"in fp32, and {available / 1e9:.1f} GB are available. Use a machine with more, verify less (convert with "
            "--verify alone instead of --verify all), or turn it off (convert without --verify, train with verify=off) "
            "and verify a smaller model of the same architecture."
        )


def model_bytes(hf_config: Any) -> int:
    """Return the size in fp32 of a model's weights."""
    return 4 * sum(math.prod(shape) for _, shape in expected_shapes(hf_config))


def reference_bytes(hf_config: Any) -> int:
    """Return the bytes that transformers' side takes: its largest layer, embedding and output layer in fp32."""
    sizes: dict[str, int] = {}
    for name, shape in expected_shapes(hf_config):
        part = ".".join(name.split(".")[:3]) if name.startswith("model.layers.") else "ends"
        sizes[part] = sizes.get(part, 0) + 4 * math.prod(shape)
    ends = sizes.pop("ends") * (2 if hf_config.tie_word_embeddings else 1)
    return ends + max(sizes.values())


def _reference_device(few: Any, groups: ParallelGroups) -> torch.device:
    """Return where transformers' layers compute: beside Megatron's, if there is room for them."""
    if groups.device.type == "cuda" and reference_bytes(few) * _HEADROOM > torch.cuda.mem_get_info(groups.device)[0]:
        return torch.device("cpu")
    return groups.device
