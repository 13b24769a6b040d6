"""Prompts, teacher responses, and the order in which prompts are drawn."""
