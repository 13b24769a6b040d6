"""The training loop: set-up, update, checkpoints and resuming."""
