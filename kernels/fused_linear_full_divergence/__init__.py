"""Exact divergences straight from two models' hidden states and output layers."""
