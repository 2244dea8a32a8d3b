"""Measuring, and printing what was measured, for `mlx-sleep bench` and `mlx-sleep eval`.

Two things are compared by timing them in turn, A B A B, in one process: the clock speed and the
neighbours of a machine drift by more than most differences that are worth printing. This module
knows no op and no model.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UserError


def clock(run: Callable[..., object], *args) -> Callable[[], float]:
    """A function that gives the seconds of run(*args), with its arrays (any tree) evaluated."""
    import mlx.core as mx

    def seconds() -> float:
        start = time.perf_counter()
        mx.eval(run(*args))
        return time.perf_counter() - start

    return seconds


def interleave(clocks: Sequence[Callable[[], float]], repeats: int) -> list[list[float]]:
    """What each clock says in each of `repeats` rounds: [clock][round].

    A round asks all clocks, one after the other, and each round begins with another one: what
    stands behind a run that empties the caches would always seem slow. One round before the
    first only warms up.
    """
    rounds = []
    for start in range(repeats + 1):
        order = [(start + i) % len(clocks) for i in range(len(clocks))]
        times = {i: clocks[i]() for i in order}
        rounds.append([times[i] for i in range(len(clocks))])
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median over rounds of over/under; a slow round slows both."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def device() -> str:
    """What computes, in words: "AMD EPYC, CPU, mlx 0.32.4, OpenBLAS 0.3.21 (Zen kernels, ...)"."""
    import mlx.core as mx

    from .. import BLAS, platform

    if mx.default_device() == mx.Device(mx.cpu):
        backend = "CPU"
    else:
        backend = "Metal" if mx.metal.is_available() else "CUDA"
    name = str(mx.device_info().get("device_name", "unknown"))
    parts = [name, backend, f"mlx {platform.mlx_distributions().get('mlx', 'unknown')}"]
    if backend == "CPU":
        parts.append(BLAS.detail if BLAS.status == "loaded" else f"BLAS {BLAS.status}")
    return ", ".join(parts)


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
