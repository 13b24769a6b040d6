"""Logits of student and teacher by name, and their divergences and gradients in float64."""

import torch

VOCAB, PADDED, ROWS = 61, 64, 9
WIDER = 72  # the teacher's vocabulary, padded differently
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = (
    "plain",
    "temperature",
    "masked",
    "all_masked",
    "large",
    "padding_would_win",
    "minus_infinity",
    "wider_teacher",
)


def expected(student, teacher, kind, vocab_size, beta, temperature, mask, upstream):
    """float64 loss [n] and gradient of the student's whole logits [n, V], by the textbook's formulas."""
    leaf = student.double().requires_grad_()
    p = (leaf[:, :vocab_size] / temperature).log_softmax(-1)
    q = (teacher.double()[:, :vocab_size] / temperature).log_softmax(-1)

    def kl(a, b):
        return torch.where(a.exp() == 0, 0.0, a.exp() * (a - b)).sum(-1)

    m = (beta * q.exp() + (1 - beta) * p.exp()).log()
    loss = {"reverse_kl": kl(p, q), "forward_kl": kl(q, p), "jsd": beta * kl(q, m) + (1 - beta) * kl(p, m)}[kind]
    loss = torch.where(mask, loss, 0.0)
    loss.backward(upstream.double())
    return loss.detach(), leaf.grad


def case(name):
    """Whole student and teacher logits, mask, temperature, beta, upstream gradient by name."""
    generator = torch.Generator().manual_seed(len(name))
    student = 3 * torch.randn(ROWS, PADDED, generator=generator)
    teacher = student[:, :VOCAB] + torch.randn(ROWS, VOCAB, generator=generator)
    teacher = torch.nn.functional.pad(teacher, (0, (WIDER if name == "wider_teacher" else PADDED) - VOCAB), value=7.0)
    mask = torch.ones(ROWS, dtype=torch.bool)
    temperature, beta = 1.0, 0.5
    if name == "temperature":
        temperature, beta = 0.7, 0.1
    elif name == "masked":
        mask[::2] = False
    elif name == "all_masked":
        mask[:] = False
    elif name == "large":  # a common shift leaves the softmax alone, but not what is computed carelessly
        student += 1e4
        teacher -= 1e4
    elif name == "padding_would_win":
        student[:, VOCAB:] = 1e4
        teacher[:, VOCAB:] = 1e4
    elif name == "minus_infinity":
        student[:, VOCAB:] = -torch.inf
        teacher[:, VOCAB:] = -torch.inf
    return student, teacher, mask, temperature, beta, torch.randn(ROWS, generator=generator)
