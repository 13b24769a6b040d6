"""Trust Region On-Policy Distillation (TrOPD) for Megatron-Core."""
