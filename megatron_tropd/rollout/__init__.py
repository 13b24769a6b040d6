"""The student writes responses in Megatron's inference engine."""
