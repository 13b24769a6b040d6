"""The definition: divergences of float64 logits."""

from megatron_tropd.kernels.full_divergence import reference


def divergence(hidden, weight, teacher_hidden, teacher_weight, kind, group, vocab_size, beta, temperature, mask):
    """Return the loss [n] fp32; hidden [n, h], weights [V/tp, h] of student and teacher, mask [n] or None."""
    student = hidden.double() @ weight.double().t()
    teacher = teacher_hidden.double() @ teacher_weight.double().t()
    return reference.divergence(student, teacher, kind, group, vocab_size, beta, temperature, mask)
