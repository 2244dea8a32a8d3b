"""All that the commands print: lines, errors, tables, JSON, progress, plots.

Text from files and models goes through `clean`. Results go to standard output, the rest to
standard error; progress is shown on a terminal only. rich is imported where it is needed, so that
`--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError
from ..utils.pip import pip_install
from ..utils.platform import device

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# C0 but newline and tab, DEL, C1, and the marks that turn the direction of a text.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without characters that drive a terminal or reorder what it shows."""
    return _UNSAFE.sub("", text)


def count(number: int, noun: str) -> str:
    """ "1 token", "2 tokens", "4 passes" """
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def holdings(tokens: int, sleeps: int, waiting: int) -> str:
    """ "134 tokens in 2 sleeps, 12 more wait for the next" """
    if not sleeps:
        return f"{count(waiting, 'token')} wait for the first sleep" if waiting else "empty"
    slept = f"{count(tokens, 'token')} in {count(sleeps, 'sleep')}"
    return f"{slept}, {waiting} more wait for the next" if waiting else slept


def shorten(text: str, width: int) -> str:
    """A status in so many columns: its last parts (after a comma) are left out until it fits."""
    while len(text) > width:
        parts = re.match(r"(.*)[,;] ", text)
        if not parts:
            return text[: max(0, width - 1)] + "…"
        text = parts[1]
    return text


def size(number: int) -> str:
    """Bytes in decimal units: "640 B", "123 KB", "1.2 MB"."""
    value, unit = float(number), "B"
    for larger in ("KB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.1f} {unit}" if unit != "B" and value < 9.95 else f"{value:.0f} {unit}"


# Lines. By `print`: rich would wrap them in a pipe, and ends the process when it breaks.


def line(text: str = "") -> None:
    """A line of the result."""
    print(clean(text), flush=True)


def note(text: str) -> None:
    """A line about what is going on, on standard error."""
    print(clean(text), file=sys.stderr, flush=True)


def piece(text: str) -> None:
    """A piece of a reply as it comes."""
    print(clean(text), end="", flush=True)


def thought(text: str, console: Console) -> None:
    """A piece of what a model thinks as it comes: dim on a terminal, nothing elsewhere."""
    if console.is_terminal:
        console.print(clean(text), style="dim", end="", markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def stdout() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


# Progress


class StatusLine:
    """One line at the bottom of a terminal; nothing elsewhere. A with block clears it."""

    def __init__(self, console: Console | None = None):
        self._console = console or stderr()
        self._progress: Any = None
        self._spinner: Any = None

    @property
    def shown(self) -> bool:
        return self._progress is not None

    def show(self, text: str) -> None:
        """Replaces the line. Print nothing else until `clear`."""
        if not self._console.is_terminal:
            return
        if self._spinner:
            self.clear()
        if self._progress is None:
            from rich.progress import Progress, TextColumn
            from rich.table import Column

            self._progress = Progress(
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
                transient=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._progress.add_task("")
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], description=self._fit(text), refresh=True)

    def spin(self, text: str) -> None:
        """As `show`, with a sign of life of its own before the text."""
        if not self._console.is_terminal:
            return
        from rich.text import Text

        if self._spinner is None:
            self.clear()
            self._spinner = self._console.status("")
            self._spinner.start()
        self._spinner.update(Text(self._fit(text, 3), style="dim"))

    def _fit(self, text: str, less: int = 1) -> str:
        return shorten(clean(text), self._console.width - less)

    def clear(self) -> None:
        if self._spinner is not None:
            spinner, self._spinner = self._spinner, None
            spinner.stop()
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()

    def __enter__(self) -> StatusLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()


@contextlib.contextmanager
def progress_bar(
    doing: str, *, total: int | None = None, unit: str = "", shown: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar on a terminal, nothing elsewhere: update(done, total=None, text="") moves it.

    unit is what is counted; "bytes" are shown in MB.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    counter = TextColumn("{task.fields[counter]}")
    console = stderr()
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if unit == "bytes" else counter,
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        console=console,
        transient=True,
        disable=not (shown and console.is_terminal),
    ) as bar:
        task = bar.add_task(doing, total=total, counter="", text="")

        def update(done: int, total: int | None = total, text: str = "") -> None:
            counted = f"{done} {unit}" if total is None else f"{done}/{total} {unit}"
            bar.update(task, completed=done, total=total, counter=counted, text=clean(text))

        yield update


# Tables and plots


def emit(command: str, rows: list[dict], as_json: bool) -> None:
    """Print the rows on standard output: as one JSON object and nothing else, or as a table."""
    if as_json:
        print_json({"command": command, "device": device(), "rows": rows})
        return
    console = stdout()
    console.print(table(rows))
    console.print(device(), style="dim", markup=False)


def emit_one(command: str, row: dict, as_json: bool) -> None:
    """As `emit`, of one row: a line for each of its values."""
    if as_json:
        emit(command, [row], as_json)
        return
    width = max(map(len, row))
    for name, value in row.items():
        line(f"{name.replace('_', ' '):{width}}  {_cell(name, value)}")
    stdout().print(device(), style="dim", markup=False)


def table(rows: list[dict]) -> Table:
    """The rows as a rich Table, a column for each key of the first one."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    result = Table(box=SIMPLE)
    for name in rows[0] if rows else ():
        text = isinstance(rows[0][name], str)
        result.add_column(name.replace("_", " "), justify="left" if text else "right")
    for row in rows:
        result.add_row(*(Text(clean(_cell(name, value))) for name, value in row.items()))
    return result


def _cell(name: str, value: Any) -> str:
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
                f"a plot needs matplotlib: {pip_install('mlx-sleep[plot]')}, or leave out --plot"
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
