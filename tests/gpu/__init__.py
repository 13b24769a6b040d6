"""All figures that need a GPU, measured by one command; see run.sh."""
