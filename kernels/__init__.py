"""Fused operations over vocabulary shards; see README.md."""
