"""Gathered log-probabilities straight from hidden states and the output layer."""
