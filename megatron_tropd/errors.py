"""The one exception of the package, apart from everything heavy so that the command line can name it at once."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the user's input: the message is one paragraph with value, expectation and remedy.

    The command line prints it once, on rank 0, without a traceback, and exits with status 2.
    """
