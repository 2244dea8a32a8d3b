"""Which of the installed BLAS libraries MLX runs on here: each is tried, and the outcome kept.

A candidate is a library with settings. OpenBLAS knows the processors of its own time, and on newer
ones takes the kernels of a much older one; OPENBLAS_CORETYPE asks for the newest that the processor
can run. Each candidate runs in processes of its own (`blas_trial`). What is wrong, crashes or hangs
is barred; of the rest the fastest is kept in the user's cache, where `load_blas` finds it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import NamedTuple

from . import atomic
from .blas import BLAS_VARIABLE, OPENBLAS, choice_file, cpu_fields, machine, stamp_of
from .files import one_line

LARGEST_ERROR = 1e-4  # relative; right ones stay below 1e-5
MARGIN = 1.15  # so many times faster than one before it, else that one stays: clocks are noisy
ROUNDS = 2  # tries of each, in turn; the best speed at each size counts
PATIENCE = 60  # seconds for one try
ROWS = 8  # machines and environments that the file remembers

_CORES = {  # OpenBLAS's kernels, and what a processor needs for them
    "Haswell": {"avx2", "fma"},
    "SkylakeX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
}


class Candidate(NamedTuple):
    """A library, as a path or as a name for the loader, and its environment."""

    library: str
    settings: dict[str, str]


@dataclass(frozen=True)
class Result:
    """Of one candidate: the library's words on itself, where it is, and its trial's outcome.

    error   largest relative error, None where it did not come to that
    gflops  by the sizes of `blas_trial`
    barred  why it may not be taken
    """

    detail: str
    path: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    error: float | None = None
    gflops: dict[str, float] = field(default_factory=dict)
    barred: str = ""

    @property
    def speed(self) -> float:
        """The geometric mean over the sizes."""
        return math.exp(sum(map(math.log, self.gflops.values())) / len(self.gflops))


@dataclass(frozen=True)
class Choice:
    """What is taken: a library's path ("" for MLX's own), its settings and its words on itself.

    stamps      size and time of each library that was tried, by path
    candidates  what was to be tried; others call for another choice
    """

    library: str
    settings: dict[str, str]
    detail: str
    stamps: dict[str, list[int] | None]
    candidates: list[list]
    results: list[Result]


def installed() -> list[Candidate]:
    """OpenBLAS as the loader finds it, conda's, and MKL from pip's wheel."""
    flags = set(cpu_fields().get("flags", "").split())
    cores = [core for core, needed in _CORES.items() if needed <= flags]
    if "OPENBLAS_CORETYPE" in os.environ:  # the user's choice
        cores = []
    condas = f"{sys.prefix}/lib/{OPENBLAS[0]}"
    found = []
    for library in (OPENBLAS[0], *filter(os.path.exists, [condas])):
        found += [Candidate(library, {})]
        found += [Candidate(library, {"OPENBLAS_CORETYPE": core}) for core in cores]
    return found + [Candidate(library, {}) for library in _mkl()]


def _mkl() -> list[str]:
    try:
        files = metadata.files("mkl") or []
    except metadata.PackageNotFoundError:
        return []
    return [
        os.path.realpath(file.locate()) for file in files if file.name.startswith("libmkl_rt.so")
    ]


def can_use_mkl() -> bool:
    """Whether pip has MKL for this machine."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def choose(
    candidates: Sequence[Candidate], run: Callable[[Candidate], dict | str] | None = None
) -> Choice | None:
    """Tries the candidates: the first that is right, unless a later one is clearly faster.

    None where none of them is there.
    """
    run = run or try_one
    tries: list[list[dict | str]] = [[] for _ in candidates]
    for _ in range(ROUNDS):
        for candidate, answers in zip(candidates, tries, strict=True):
            if not any(isinstance(answer, str) for answer in answers):
                answers.append(run(candidate))
    results: list[Result] = []
    for candidate, answers in zip(candidates, tries, strict=True):
        result = _result(candidate, answers)
        # A library may not know a setting, and one may be found twice.
        if result and (result.path, result.detail) not in [(r.path, r.detail) for r in results]:
            results.append(result)
    if not results:
        return None
    best = None
    for result in results:
        if not result.barred and (best is None or result.speed > MARGIN * best.speed):
            best = result
    best = best or Result("MLX's reference BLAS")
    stamps = {result.path: stamp_of(result.path) for result in results}
    tried = [list(candidate) for candidate in candidates]
    return Choice(best.path, best.settings, best.detail, stamps, tried, results)


def try_one(candidate: Candidate) -> dict | str:
    """What `blas_trial` says of it in a new process, or how that ended."""
    environment = {**os.environ, BLAS_VARIABLE: candidate.library, **candidate.settings}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "mlx_sleep.utils.blas_trial"],
            env=environment,
            capture_output=True,
            timeout=PATIENCE,
        )
        if done.returncode < 0:
            with contextlib.suppress(ValueError):  # a signal without a name
                return f"crashed ({signal.Signals(-done.returncode).name})"
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            return f"failed ({last or f'exit code {done.returncode}'})"
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"no answer in {PATIENCE} seconds"
    except (OSError, ValueError, IndexError) as error:
        return f"failed ({one_line(error)})"


def _result(candidate: Candidate, answers: list[dict | str]) -> Result | None:
    """The outcome of its tries, None where it isn't installed."""
    good = [answer for answer in answers if isinstance(answer, dict)]
    if any(answer["status"] != "loaded" for answer in good):
        return None
    library, settings = candidate
    words = " ".join([os.path.basename(library), *(f"{n}={x}" for n, x in settings.items())])
    for answer in answers:
        if isinstance(answer, str):
            return Result(
                words, library if os.path.exists(library) else "", settings, barred=answer
            )
    error = max(answer["error"] for answer in good)
    gflops = {size: max(answer["gflops"][size] for answer in good) for size in good[0]["gflops"]}
    detail, path = good[0]["detail"], good[0]["path"] or library
    barred = "" if error < LARGEST_ERROR else "wrong"
    return Result(detail, path, settings, error, gflops, barred)


def keep(choice: Choice) -> str:
    """Keeps it in the user's cache: "", or why that could not be."""
    file = choice_file()
    try:
        rows = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        rows = {}
    rows = rows if isinstance(rows, dict) else {}
    rows.pop(machine(), None)
    rows = dict([*rows.items(), (machine(), asdict(choice))][-ROWS:])
    try:
        atomic.make_folder(file.parent)
        atomic.replace_file(file, json.dumps(rows, indent=1).encode())
    except OSError as error:
        return f"{file}: {error.strerror or error}"
    return ""
