"""What to type to install a package that is missing."""

from __future__ import annotations

import shlex
import sys


def pip_install(requirement: str) -> str:
    """The command that installs `requirement` into the environment of this process.

    By the interpreter's path: the environments of uv and pipx are never activated, so that a plain
    `pip install` would go to another one.
    """
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(requirement)}"
