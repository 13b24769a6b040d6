"""What is compared: for each operation ours, plain PyTorch, torch.compile of it, and the peers that are installed.

Every contestant is a call that runs forward and backward on the same tensors. Peers answer the same question as closely
as they can; where they do not, their name says so.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_tropd.kernels import (
    full_divergence,
    fused_linear_full_divergence,
    fused_linear_logprobs,
    vocab_parallel_logprobs,
    vocab_parallel_topk,
)

Loss = Callable[..., torch.Tensor]  # of tensors


@dataclass(frozen=True)
class Contestant:
    """One implementation of an operation; `call` is None where it cannot run here, for the reason in `name`."""

    name: str
    call: Callable[[], object] | None
    plain: bool = True  # made of operators whose traffic can be counted


@dataclass(frozen=True)
class Case:
    """An operation at one size; `floor_passes` counts how often logits must be read or written at least."""

    operation: str
    tokens: int
    vocab: int
    floor_bytes: int
    contestants: list[Contestant]


class Material:
    """Logits, ids and upstream gradients of one size; hidden states and weights for the fused operations."""

    def __init__(self, tokens: int, vocab: int, k: int, hidden: int, dtype: torch.dtype, device: torch.device):
        """Draw them; memory-hungry parts are made on first use."""
        self.tokens, self.vocab, self.k, self.hidden_size = tokens, vocab, k, hidden
        self.dtype, self.device = dtype, device
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

        self.draw = draw
        self.ids = torch.randint(vocab, (tokens, 1 + k), generator=generator, device=device)
        self.upstream = torch.randn(tokens, 1 + k, generator=generator, device=device)

    def hidden_states(self) -> torch.Tensor:
        """Draw [tokens, hidden size] of unit variance, as a final layer norm gives."""
        return self.draw(self.tokens, self.hidden_size)

    def output_weight(self) -> torch.Tensor:
        """Draw [vocab, hidden size] that makes logits of the spread that language models have (3)."""
        return self.draw(self.vocab, self.hidden_size) * (3 / self.hidden_size**0.5)

    @property
    def logits_bytes(self) -> int:
        """Size of one [tokens, vocab] tensor."""
        return self.tokens * self.vocab * self.dtype.itemsize


def backward(loss: torch.Tensor, leaves: list[torch.Tensor], upstream: torch.Tensor | None = None) -> None:
    """Run the backward pass and drop the gradients."""
    torch.autograd.grad(loss, leaves, torch.ones_like(loss) if upstream is None else upstream)


def compiled(function: Loss) -> Loss:
    """torch.compile the naive forward; autograd compiles its backward."""
    torch.compiler.reset()  # else it gives up, silently, after it has compiled one function for eight sizes
    return torch.compile(function, dynamic=False)


def logprobs(m: Material) -> Case:
    """Gathered log-probs at 1 + k ids, forward and backward. Floor: read, read, write."""
    logits = m.draw(m.tokens, m.vocab).requires_grad_()

    def ours(**options: Any) -> None:
        # Through a view, since a leaf cannot be overwritten; the numbers in it do not matter to the clock.
        picked = vocab_parallel_logprobs(logits.view_as(logits), m.ids, None, m.vocab, **options)[0]
        backward(picked, [logits], m.upstream)

    def forward(z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return z.float().log_softmax(-1).gather(-1, ids)

    def naive(function: Loss) -> None:
        backward(function(logits, m.ids), [logits], m.upstream)

    fast = compiled(forward)
    contestants = [
        Contestant("ours", ours),
        Contestant("ours, gradient in place", lambda: ours(inplace_backward=True)),
        Contestant("ours, with entropy", lambda: ours(with_entropy=True)),
        Contestant("PyTorch", lambda: naive(forward)),
        Contestant("torch.compile", lambda: naive(fast), plain=False),
        megatron_cross_entropy(m, logits),
    ]
    return Case("log-probs", m.tokens, m.vocab, 3 * m.logits_bytes, contestants)


def megatron_cross_entropy(m: Material, logits: torch.Tensor) -> Contestant:
    """Megatron's vocabulary-parallel cross-entropy: one id per token."""
    name = "Megatron-Core cross-entropy (1 id)"
    if importlib.util.find_spec("megatron") is None:
        return Contestant(f"{name}: not installed", None)
    try:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        start_megatron(m.device)
    except Exception as error:
        return Contestant(f"{name}: {_reason(error)}", None)

    def call() -> None:
        # It overwrites its input on the way, so it gets a copy, as in training it gets a layer's fresh product.
        backward(vocab_parallel_cross_entropy(logits[:, None] * 1.0, m.ids[:, :1]), [logits])

    return Contestant(name, call)


def start_megatron(device: torch.device) -> None:
    """Make Megatron's groups of one process, which its cross-entropy asks for."""
    from megatron.core import parallel_state

    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    if not torch.distributed.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, rank=0, world_size=1, store=torch.distributed.HashStore())
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()


def divergence(m: Material, kind: str) -> Case:
    """A full divergence, forward and backward. Floor: read both, read both, write (jsd: read both once more)."""
    student, teacher = m.draw(m.tokens, m.vocab).requires_grad_(), m.draw(m.tokens, m.vocab)

    def ours(**options: Any) -> None:
        loss = full_divergence(student.view_as(student), teacher, kind, None, m.vocab, **options)
        backward(loss, [student])

    def forward(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        p, q = s.float().log_softmax(-1), t.float().log_softmax(-1)
        if kind == "jsd":
            mixture = torch.logaddexp(p, q) - 0.6931471805599453
            return 0.5 * _kl(p, mixture) + 0.5 * _kl(q, mixture)
        return _kl(q, p) if kind == "forward_kl" else _kl(p, q)

    def naive(function: Loss) -> None:
        backward(function(student, teacher), [student])

    fast = compiled(forward)
    contestants = [
        Contestant("ours", ours),
        Contestant("ours, gradient in place", lambda: ours(inplace_backward=True)),
        Contestant("PyTorch", lambda: naive(forward)),
        Contestant("torch.compile", lambda: naive(fast), plain=False),
        model_optimizer(student, teacher, kind),
        trl(student, teacher, kind),
    ]
    passes = 7 if kind == "jsd" else 5
    return Case(kind.replace("_kl", " KL"), m.tokens, m.vocab, passes * m.logits_bytes, contestants)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def model_optimizer(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> Contestant:
    """Model-Optimizer's LogitsKLLoss, which has both KLs."""
    name = "Model-Optimizer LogitsKLLoss"
    if kind == "jsd":
        return Contestant(f"{name}: has no JSD", None)
    loss = _model_optimizer_loss("LogitsKLLoss", reverse=kind == "reverse_kl")
    if isinstance(loss, str):
        return Contestant(f"{name}: {loss}", None)
    return Contestant(name, lambda: backward(_per_token(loss(student[:, None], teacher[:, None])), [student]))


def _per_token(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def _model_optimizer_loss(class_name: str, **options: Any) -> Callable[..., Any] | str:
    """Return the loss object, or why there is none."""
    try:
        from modelopt.torch.distill.plugins import megatron as plugin

        config = SimpleNamespace(tensor_model_parallel_size=1, sequence_parallel=False, context_parallel_size=1)
        return getattr(plugin, class_name)(config, **options)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    """Return in a few words why a peer cannot run: most raise a custom exception if a part is missing."""
    if isinstance(error, ImportError):
        return f"not importable ({type(error).__name__})"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:60]}"


def trl(student: torch.Tensor, teacher: torch.Tensor, kind: str) -> Contestant:
    """TRL's generalized JSD, beta 0 and 1 being the KLs."""
    name = "TRL generalized JSD"
    try:
        from trl.experimental.gkd.gkd_trainer import GKDTrainer
    except Exception as error:
        return Contestant(f"{name}: {_reason(error)}", None)
    beta = {"forward_kl": 0, "reverse_kl": 1, "jsd": 0.5}[kind]

    def call() -> None:
        loss = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=beta)
        backward(loss, [student])

    return Contestant(name, call)


def topk_divergence(m: Material) -> Case:
    """Forward KL over the teacher's top-k, renormalised: the teacher's selection, then forward and backward."""
    student, teacher = m.draw(m.tokens, m.vocab).requires_grad_(), m.draw(m.tokens, m.vocab)

    def loss_of(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
        return F.kl_div(
            student_logprobs.log_softmax(-1), teacher_logprobs.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)

    def ours() -> None:
        values, ids = vocab_parallel_topk(teacher, m.k, None, m.vocab)
        picked = vocab_parallel_logprobs(student.view_as(student), ids, None, m.vocab)[0]
        backward(loss_of(picked, values), [student])

    def naive() -> None:
        values, ids = teacher.float().log_softmax(-1).topk(m.k)
        backward(loss_of(student.float().log_softmax(-1).gather(-1, ids), values), [student])

    contestants = [Contestant("ours", ours), Contestant("PyTorch", naive)]
    peer = _model_optimizer_loss("TopKLogitsKLLoss", top_k=m.k)
    name = "Model-Optimizer TopKLogitsKLLoss"
    if isinstance(peer, str):
        contestants.append(Contestant(f"{name}: {peer}", None))
    else:
        contestants.append(
            Contestant(name, lambda: backward(_per_token(peer(student[:, None], teacher[:, None])), [student]))
        )
    return Case("top-k forward KL", m.tokens, m.vocab, 4 * m.logits_bytes, contestants)


def fused_logprobs(m: Material) -> Case:
    """Log-probs from hidden states. Floor: the bytes of inputs and gradients."""
    hidden, weight = m.hidden_states().requires_grad_(), m.output_weight().requires_grad_()

    def ours() -> None:
        backward(fused_linear_logprobs(hidden, weight, m.ids, None, m.vocab)[0], [hidden, weight], m.upstream)

    def forward(h: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return (h @ w.t()).float().log_softmax(-1).gather(-1, ids)

    def naive(function: Loss) -> None:
        backward(function(hidden, weight, m.ids), [hidden, weight], m.upstream)

    fast = compiled(forward)
    contestants = [
        Contestant("ours", ours),
        Contestant("PyTorch", lambda: naive(forward)),
        Contestant("torch.compile", lambda: naive(fast), plain=False),
        products_only(m, hidden, weight, models=1),
    ]
    floor = 2 * (hidden.numel() + weight.numel()) * m.dtype.itemsize
    return Case("fused linear log-probs", m.tokens, m.vocab, floor, contestants)


def products_only(m: Material, hidden: torch.Tensor, weight: torch.Tensor, models: int) -> Contestant:
    """The matrix products of the fused operation alone, in chunks of 1,024 tokens: the floor of its time."""

    def call() -> None:
        with torch.no_grad():
            for chunk in hidden.split(1024):
                for _ in range(2 * models):
                    logits = chunk @ weight.t()
                logits @ weight
                logits.t() @ chunk

    return Contestant("(its matrix products alone)", call)


def fused_jsd(m: Material) -> Case:
    """JSD from hidden states. Floor: the bytes of inputs and gradients."""
    hidden, weight = m.hidden_states().requires_grad_(), m.output_weight().requires_grad_()
    teacher_hidden, teacher_weight = m.hidden_states(), m.output_weight()

    def ours() -> None:
        loss = fused_linear_full_divergence(hidden, weight, teacher_hidden, teacher_weight, "jsd", None, m.vocab)
        backward(loss, [hidden, weight])

    def naive() -> None:
        p = (hidden @ weight.t()).float().log_softmax(-1)
        q = (teacher_hidden @ teacher_weight.t()).float().log_softmax(-1)
        mixture = torch.logaddexp(p, q) - 0.6931471805599453
        backward(0.5 * _kl(p, mixture) + 0.5 * _kl(q, mixture), [hidden, weight])

    contestants = [Contestant("ours", ours), Contestant("PyTorch", naive)]
    contestants.append(liger(m, hidden, weight, teacher_hidden, teacher_weight))
    contestants.append(products_only(m, hidden, weight, models=2))
    floor = (3 * hidden.numel() + 3 * weight.numel()) * m.dtype.itemsize
    return Case("fused linear JSD", m.tokens, m.vocab, floor, contestants)


def liger(
    m: Material,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
) -> Contestant:
    """Liger-Kernel's fused linear JSD: Triton, CUDA only."""
    name = "Liger-Kernel fused linear JSD"
    if m.device.type != "cuda":
        return Contestant(f"{name}: CUDA only", None)
    try:
        from liger_kernel.transformers import LigerFusedLinearJSD
    except Exception as error:
        return Contestant(f"{name}: {_reason(error)}", None)
    module = LigerFusedLinearJSD()

    def call() -> None:
        backward(module(hidden, weight, teacher_hidden, teacher_weight, None), [hidden, weight])

    return Contestant(name, call, plain=False)


def all_cases(m: Material, wanted: list[str]) -> Iterator[Case]:
    """Yield the cases whose name holds one of `wanted` (all without), made one at a time."""
    makers = {
        "log-probs": logprobs,
        "forward KL": lambda m: divergence(m, "forward_kl"),
        "reverse KL": lambda m: divergence(m, "reverse_kl"),
        "jsd": lambda m: divergence(m, "jsd"),
        "top-k forward KL": topk_divergence,
        "fused linear log-probs": fused_logprobs,
        "fused linear JSD": fused_jsd,
    }
    for name, make in makers.items():
        if not wanted or name in wanted:
            yield make(m)
