"""Printing rows, as a table or as JSON, and drawing them."""

from __future__ import annotations

import json
from pathlib import Path

from ..utils.errors import UserError
from ..utils.platform import device


def emit(command: str, rows: list[dict], as_json: bool) -> None:
    """Print the rows on standard output: as one JSON object and nothing else, or as a table."""
    if as_json:
        result = {"command": command, "device": device(), "rows": rows}
        print(json.dumps(result, indent=2, allow_nan=False))
        return
    from rich.console import Console

    console = Console(highlight=False)
    console.print(table(rows))
    console.print(device(), style="dim")


def table(rows: list[dict]):
    """The rows as a rich Table, a column for each key of the first one."""
    from rich.box import SIMPLE
    from rich.table import Table

    result = Table(box=SIMPLE)
    for name in rows[0] if rows else ():
        text = isinstance(rows[0][name], str)
        result.add_column(name.replace("_", " "), justify="left" if text else "right")
    for row in rows:
        result.add_row(*(_cell(name, value) for name, value in row.items()))
    return result


def _cell(name: str, value) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "x".join(map(str, value))
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.3f} MB" if value else "0"
    if isinstance(value, float):
        return (
            f"{value:.0e}" if name == "error" else f"{value:.3g}" if value < 1 else f"{value:.2f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


class Plot:
    """A picture of the rows in a file; its suffix says of which kind (.png, .svg, .pdf).

    Made before the measuring, so that a missing matplotlib or folder costs nobody the wait.
    """

    def __init__(self, file: str | Path):
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UserError(
                "a plot needs matplotlib: pip install 'mlx-sleep[plot]', or leave out --plot"
            ) from None
        self._file = Path(file)
        self._figure = Figure(figsize=(7, 4.5), layout="constrained")
        known = self._figure.canvas.get_supported_filetypes()
        if self._file.suffix.lstrip(".") not in known:
            raise UserError(f"--plot {file}: the name must end in .png, .svg or .pdf")
        if not self._file.parent.is_dir():
            raise UserError(f"--plot {file}: there is no folder {self._file.parent}")
        self.axes = self._figure.subplots()

    def save(self) -> None:
        """Write the file. UserError when that can't be done."""
        try:
            self._figure.savefig(self._file, dpi=150)
        except OSError as error:
            raise UserError(f"cannot write {self._file}: {error.strerror}") from error
