"""Runs a plan, each run in a process of its own, several at a time; finished runs are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from ...utils.errors import UserError
from ...utils.files import os_errors_as_user_errors
from .plan import Run
from .records import check_metrics, finished, steps_done

# One thread for each process when there are several: they share the CPUs already.
_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def default_jobs() -> int:
    """Runs at a time: one for each CPU where MLX computes on the CPU, else one."""
    import mlx.core as mx

    from ...utils.platform import available_cpus

    return available_cpus() if mx.default_device() == mx.Device(mx.cpu) else 1


def make_folder(out: Path) -> None:
    with os_errors_as_user_errors(f"cannot write to {out}", "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)


def run_all(
    runs: Sequence[Run],
    out: Path,
    jobs: int = 1,
    on_change: Callable[[list[Run], list[tuple[Run, int]], int], None] | None = None,
    on_done: Callable[[Run, dict], None] | None = None,
) -> dict[str, dict]:
    """name -> result of every run. Runs of another config are found before anything starts.

    on_change(waiting, [(running, its step)], done) is called about once a second, on_done(run,
    result) for each run that this call finished. UserError when a run fails; the others are
    stopped then, as they are by Ctrl-C, and go on when the study is asked for again.
    """
    make_folder(out)
    results: dict[str, dict] = {}
    waiting: list[Run] = []
    for run in runs:
        result = finished(out / run.name, run.settings)
        if result is None:
            check_metrics(out / run.name)
            waiting.append(run)
        else:
            results[run.name] = result
    running: list[tuple[Run, subprocess.Popen[str], IO[str]]] = []  # with its standard error
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running.append((run, *_start(run, out / run.name, jobs)))
            for entry in list(running):
                run, process, errors = entry
                if process.poll() is None:
                    continue
                running.remove(entry)
                results[run.name] = _result(run, out / run.name, process, errors)
                if on_done:
                    on_done(run, results[run.name])
            if on_change:
                steps = [(run, steps_done(out / run.name)) for run, _, _ in running]
                on_change(waiting, steps, len(results))
            if running:
                time.sleep(0.2)
    finally:
        for _, process, _ in running:
            process.terminate()
        for _, process, errors in running:
            process.wait()
            errors.close()
    return {run.name: results[run.name] for run in runs}


def _start(run: Run, folder: Path, jobs: int) -> tuple[subprocess.Popen[str], IO[str]]:
    environment = dict(os.environ)
    if jobs > 1:
        environment |= dict.fromkeys(_THREADS, "1")
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_sleep.lab.study.worker", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        text=True,
        env=environment,
        start_new_session=True,  # Ctrl-C is ours to pass on
    )
    assert process.stdin is not None  # a pipe
    with process.stdin as pipe:
        json.dump(run.settings, pipe)
    return process, errors


def _result(run: Run, folder: Path, process: subprocess.Popen[str], errors: IO[str]) -> dict:
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    errors.close()
    result = finished(folder, run.settings) if process.returncode == 0 else None
    if result is None:
        why = lines[-1].removeprefix("error: ") if lines else f"exit code {process.returncode}"
        raise UserError(f"the run {run.name} failed: {why}")
    return result
