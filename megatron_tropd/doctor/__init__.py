"""Checks of a machine, with small random models."""
