"""Tokenizers, chat templates, and the ids that end a text."""
