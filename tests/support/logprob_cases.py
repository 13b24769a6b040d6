"""Logits and ids by name, and their log-probs, entropies and gradients in float64."""

import torch

VOCAB, PADDED, ROWS = 61, 64, 9


def reference(logits, ids, vocab_size, temperature, mask, upstream):
    """float64: log-probs [n, j], entropy [n] and the gradient of the whole logits [n, V]."""
    whole = logits.double().requires_grad_()
    everything = (whole[:, :vocab_size] / temperature).log_softmax(-1)
    picked = torch.where(mask[:, None], everything.gather(-1, ids), 0.0)
    entropy = torch.where(mask, -(everything.exp() * everything).sum(-1), 0.0)
    picked.backward(upstream.double())
    return picked.detach(), entropy.detach(), whole.grad


def case(name: str):
    """Whole logits, ids, mask, temperature and upstream gradient by name."""
    generator = torch.Generator().manual_seed(len(name))
    logits = 3 * torch.randn(ROWS, PADDED, generator=generator)
    ids = torch.randint(VOCAB, (ROWS, 5), generator=generator)
    ids[:, 3] = ids[:, 0]  # a repeated id collects both gradients
    mask = torch.ones(ROWS, dtype=torch.bool)
    upstream = torch.randn(ROWS, 5, generator=generator)
    temperature = 1.0
    if name == "temperature":
        temperature = 0.7
    elif name == "masked":
        mask[::2] = False
    elif name == "all_masked":
        mask[:] = False
    elif name == "large":
        logits[:, ::3] = 1e4
        logits[:, 1::3] = -1e4
    elif name == "padding_would_win":
        logits[:, VOCAB:] = 1e4
    return logits, ids, mask, temperature, upstream


CASES = ("plain", "temperature", "masked", "all_masked", "large", "padding_would_win")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
