"""The seam to Megatron-Core: everything that touches its private parts, and layers that it lacks."""
