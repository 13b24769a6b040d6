"""Gathered log-probabilities over a sharded vocabulary."""
