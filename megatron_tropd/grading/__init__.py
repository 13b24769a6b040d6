"""Comparison of answers: texts, numbers, forms and expressions."""
