"""The package's exception for user errors; imports nothing heavy, so that the command line starts at once."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input: the message is one paragraph with value, expectation and remedy.

    The command line prints it once, on rank 0, without a traceback, and exits with status 2.
    """
