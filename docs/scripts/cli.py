"""Writes docs/cli.md, the reference of the command line, with typer's own tool.

python docs/scripts/cli.py [--check]
"""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import typer

PAGE = Path(__file__).resolve().parents[1] / "cli.md"


def reference() -> str:
    """What typer prints of the commands, one level of headings lower, without "--help" and HTML."""
    command = [sys.executable, "-m", "typer", "mlx_sleep.cli", "utils", "docs"]
    made = subprocess.run(
        [*command, "--name", "mlx-sleep", "--title", "Command line"],
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    made = re.sub(r"^\* `--help`.*\n", "", html.unescape(made), flags=re.MULTILINE)
    made = re.sub(r"\*\*Options\*\*:\n\n(?!\*)", "", made)
    note = f"<!-- by docs/scripts/cli.py and typer {typer.__version__}; not written by hand -->"
    title, _, rest = made.partition("\n")
    return f"{title}\n\n{note}\n{rest.rstrip()}\n"


def main() -> None:
    text = reference()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/cli.md is stale; run python docs/scripts/cli.py")


if __name__ == "__main__":
    main()
