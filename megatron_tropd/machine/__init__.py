"""What this machine has, and whether a recipe can run on it."""
