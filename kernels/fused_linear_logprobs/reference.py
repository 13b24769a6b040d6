"""The definition: gathered log-probs of float64 logits."""

from megatron_tropd.kernels.logprobs import reference


def logprobs(hidden, weight, ids, group, vocab_size, temperature, mask):
    """Return log-probs, entropy, largest probability; hidden [n, h], weight [V/tp, h], ids [n, j], mask [n] or None."""
    logits = hidden.double() @ weight.double().t()
    return reference.logprobs(logits, ids, group, vocab_size, temperature, mask)
