"""Exact divergences between two whole distributions over a sharded vocabulary."""
