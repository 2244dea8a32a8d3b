"""The one exception that the command line shows as a message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad environment. The message is one line and says what to do next."""


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, and nobody stopped it: an exception, or the panic of a library
    in Rust (tokenizers), which is none of Python's exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
