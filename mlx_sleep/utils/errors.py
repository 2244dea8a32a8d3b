"""The one exception that the command line shows as a message instead of a traceback."""

from __future__ import annotations

import errno
import sys


class UserError(Exception):
    """Bad input or a bad environment. The message is one line and says what to do next."""


def is_failure(error: BaseException) -> bool:
    """Whether something went wrong, and nobody stopped it: an exception, or the panic of a library
    in Rust (tokenizers), which is none of Python's exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def message_of(error: UserError | OSError) -> str:
    """The line that a program shows for an error that ends it."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    # Not foreseen where it came up, as standard output on a full disk.
    where = error.filename or "standard input or output"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "free some space there" if full else "check it, or use another"
    return " ".join(f"{where}: {error.strerror or error}; {remedy}".split())


def errors_in_one_line() -> None:
    """From now on an error that ends this process is shown as `mlx-sleep` shows it: one line on
    standard error, exit status 1. For scripts; the command line catches its own."""

    def show(kind, error, traceback):
        if isinstance(error, (UserError, OSError)):
            print(f"error: {message_of(error)}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print("error: aborted", file=sys.stderr)
        else:  # a bug
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = show
