"""Megatron models: building, converting, verifying, reading and writing weights."""
