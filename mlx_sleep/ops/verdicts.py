"""Which of an op's implementations is right and fastest on this machine, measured and kept.

A verdict is about one `Shape`. `judge` runs what may be taken against the definition and the clock;
`Verdicts` keeps the outcome in a file of the user's cache folder, for one device, macOS, MLX and
package. This module knows no op and no GPU.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata, resources
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import platformdirs

from ..utils import atomic
from ..utils.files import one_line


class Shape(NamedTuple):
    """What one verdict is about: inputs that differ in batch and number of tokens alone.

    op      gated_delta, ssd, short_conv, dynamic_conv; a whole mixer: gated_delta_net, mamba2,
            delta_attention
    use     "token" (T = 1), "prompt" (more tokens) or "gradient"
    sizes   Hk, Hv, Dk, Dv, and of a mixer K; of a convolution C, K
    dtypes  of the arrays, in the order of the op's arguments
    """

    op: str
    use: str
    sizes: tuple[int, ...]
    dtypes: tuple[mx.Dtype, ...]

    def __str__(self) -> str:
        dtypes = ",".join(str(dtype).removeprefix("mlx.core.") for dtype in self.dtypes)
        return f"{self.op} {self.use} {'x'.join(map(str, self.sizes))} {dtypes}"


@dataclass(frozen=True)
class Result:
    """Of one candidate: its largest relative error, seconds a run, and why it may not be taken."""

    error: float | None = None
    seconds: float | None = None
    barred: str = ""


@dataclass(frozen=True)
class Verdict:
    """The path that is taken, and the results by path. No results: the judging never ended."""

    taken: str
    results: dict[str, Result] = field(default_factory=dict)


# --- judging -------------------------------------------------------------------------------

REPEATS = 5  # timings of each candidate, of which the best counts
REACH = 2.0  # so many times slower than the best in two timings is not timed again
CHAIN = 4  # runs of one timing, each on the state that the one before it left

Arrays = Sequence[mx.array]


@dataclass(frozen=True)
class Trial:
    """How a shape is judged.

    forms       what may be taken, by path, the safest last: arrays -> arrays
    cases       arrays to prove them on, and what the definition makes of those
    timed       arrays to time them on
    feed        (arrays, results) -> arrays of the next run
    tolerance   largest error allowed, relative to an array's largest entry
    """

    forms: dict[str, Callable[..., Arrays]]
    cases: Sequence[tuple[Any, Sequence[np.ndarray]]]
    timed: Any
    feed: Callable[[Any, Arrays], Any]
    tolerance: float


def judge(trial: Trial, clock: Callable[[], float] = time.perf_counter) -> Verdict:
    """The fastest of those that are right; the last of all where none is.

    One that raises, gives another shape, or is not finite is barred, too.
    """
    results = {path: _prove(form, trial) for path, form in trial.forms.items()}
    seconds = {path: float("inf") for path, result in results.items() if not result.barred}
    for repeat in range(REPEATS):  # in turn: a GPU's clock rises while it works
        for path in list(seconds):
            if repeat > 1 and seconds[path] > REACH * min(seconds.values()):
                continue
            try:
                seconds[path] = min(seconds[path], _time(trial.forms[path], trial, clock))
            except Exception as error:
                del seconds[path]
                results[path] = Result(results[path].error, barred=one_line(error))
    for path, best in seconds.items():
        results[path] = Result(results[path].error, best)
    taken = min(seconds, key=seconds.__getitem__, default=list(trial.forms)[-1])
    return Verdict(taken, results)


def _prove(form: Callable[..., Arrays], trial: Trial) -> Result:
    worst = 0.0
    try:
        for case, expected in trial.cases:
            for got, right in zip(form(case), expected, strict=True):
                error = relative_error(got, right)
                if not np.isfinite(error):
                    return Result(barred="not finite")
                worst = max(worst, error)
    except Exception as error:  # whatever a compiler or a launch sets off
        return Result(barred=one_line(error))
    return Result(worst, barred="" if worst <= trial.tolerance else "wrong")


def _time(form: Callable[..., Arrays], trial: Trial, clock: Callable[[], float]) -> float:
    case = trial.timed
    start = clock()
    for _ in range(CHAIN):
        results = form(case)
        case = trial.feed(case, results)
    mx.eval(results)
    return (clock() - start) / CHAIN


def relative_error(got: mx.array, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected entry. ValueError for another shape."""
    found = np.array(got.astype(mx.float32))
    if found.shape != expected.shape:
        raise ValueError(f"its result is {list(found.shape)}, not {list(expected.shape)}")
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


# --- keeping -------------------------------------------------------------------------------


class Verdicts:
    """Verdicts by shape, from a JSON file and into it.

    The file holds {machine: {shape: verdict}}. One that is damaged, or not like that, counts as
    empty. Where it can't be written, verdicts last as long as the process.
    """

    def __init__(self, file: Path, machine: str):
        self.file, self.machine = file, machine
        self._known: dict[str, Verdict] = _verdicts(self._read().get(machine, {}))
        self._by_shape: dict[Shape, Verdict | None] = {}  # spares a name for each call of an op

    def get(self, shape: Shape) -> Verdict | None:
        if shape not in self._by_shape:
            self._by_shape[shape] = self._known.get(str(shape))
        return self._by_shape[shape]

    def all(self) -> dict[str, Verdict]:
        """By the names of the shapes."""
        return dict(self._known)

    def put(self, shape: Shape, verdict: Verdict) -> None:
        self._by_shape[shape] = self._known[str(shape)] = verdict
        self._write(lambda rows: rows.update({str(shape): asdict(verdict)}))

    def drop(self, shape: Shape) -> None:
        """Forgets a verdict."""
        self._by_shape.pop(shape, None)
        self._known.pop(str(shape), None)
        self._write(lambda rows: rows.pop(str(shape), None))

    def _write(self, change: Callable[[dict], object]) -> None:
        """Changes what the file has for this machine. Other processes wait meanwhile."""
        with contextlib.suppress(OSError):
            atomic.make_folder(self.file.parent)
            folder = os.open(self.file.parent, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX)
                everything = self._read()
                change(everything.setdefault(self.machine, {}))
                atomic.replace_file(self.file, json.dumps(everything, indent=1).encode())
            finally:
                os.close(folder)

    def _read(self) -> dict[str, dict]:
        try:
            found = json.loads(self.file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {machine: rows for machine, rows in found.items() if isinstance(rows, dict)}


def _verdicts(rows: dict) -> dict[str, Verdict]:
    """Those of the rows that are sound."""
    found = {}
    for name, row in rows.items():
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            results = {path: _result(**result) for path, result in row["results"].items()}
            found[name] = Verdict(str(row["taken"]), results)
    return found


def _result(error: Any, seconds: Any, barred: Any) -> Result:
    """TypeError for what a Result cannot hold."""
    if not all(x is None or type(x) in (int, float) for x in (error, seconds)):
        raise TypeError("not a number")
    return Result(error, seconds, str(barred))


@functools.cache
def verdicts() -> Verdicts:
    """This machine's."""
    return Verdicts(verdicts_file(), machine())


def verdicts_file() -> Path:
    return platformdirs.user_cache_path("mlx-sleep", appauthor=False) / "verdicts.json"


def machine() -> str:
    """What a verdict holds for: device, macOS, MLX, package, and the text of its kernels."""
    files = sorted(resources.files("mlx_sleep.kernels").iterdir(), key=lambda file: file.name)
    texts = [file.read_bytes() for file in files if file.name.endswith((".metal", ".py"))]
    kernels = hashlib.sha256(b"".join(texts)).hexdigest()[:12]
    parts = (
        str(mx.device_info().get("device_name", "unknown")),
        f"macOS {platform.mac_ver()[0] or 'none'}",
        f"mlx {metadata.version('mlx')}",
        f"mlx-sleep {metadata.version('mlx-sleep')} {kernels}",
    )
    return ", ".join(parts)
