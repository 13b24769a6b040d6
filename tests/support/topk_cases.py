"""Logits by name, and their largest log-probs and ids in float64."""

import torch

VOCAB, PADDED, ROWS = 61, 64, 10


def cases():
    generator = torch.Generator().manual_seed(0)
    plain = 3 * torch.randn(ROWS, PADDED, generator=generator)
    ties = torch.randint(-2, 3, (ROWS, PADDED), generator=generator).float()
    padding = plain.clone()
    padding[:, VOCAB:] = 100.0
    return {"plain": plain, "ties": ties, "zeros": torch.zeros(ROWS, PADDED), "padding_would_win": padding}


def expected(logits, k, temperature, mask):
    everything = (logits.double()[:, :VOCAB] / temperature).log_softmax(-1)
    values, ids = everything.sort(dim=-1, descending=True, stable=True)  # equal ones by lower id
    keep = mask[:, None]
    return torch.where(keep, values[:, :k], 0.0), torch.where(keep, ids[:, :k], 0)
