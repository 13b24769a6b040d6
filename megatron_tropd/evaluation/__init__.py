"""Accuracy on problems, and generation outside of training."""
