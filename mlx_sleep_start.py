"""Where the command `mlx-sleep` begins. Outside the package, because importing it takes a moment,
in which Ctrl-C must end the process as it does later: in silence."""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point."""
    try:
        from mlx_sleep.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
