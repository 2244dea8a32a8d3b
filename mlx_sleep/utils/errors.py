"""The one exception that the command line shows as a message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. The message is one line and says what to do next."""
