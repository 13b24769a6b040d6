"""The command line's commands and their arguments."""
