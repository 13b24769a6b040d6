"""Most probable tokens over a sharded vocabulary."""
