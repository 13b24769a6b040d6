"""Hugging Face folders: configurations, weight files, names of tensors."""
