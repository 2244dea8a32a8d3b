"""Flips the operators of the Metal kernels, one at a time, and counts how many a check catches.

    python -m tests.metal.mutants [--file conv.metal] [--sample 20] [--jobs 2]

Each changed kernel is compiled and runs its checks of kernel_checks.py in a process of its own, the
cheapest first and without optimisation, until one fails. One that no longer compiles is no mutant
and is not counted. Results are kept in the user's cache folder under a hash of all that decides
them, so that a run that was cut off goes on from there. Last line: N caught, M missed.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from mlx_sleep.kernels import chunks, conv, delta_attention, gated_delta, source, ssd

from . import harness
from .harness import build
from .kernel_checks import CHECKS

assert mlx_sleep  # imported for its effect
HERE = Path(__file__).parent
ROOT = HERE.parent.parent
source.without_metal = harness.metal_kernel
KERNELS = (chunks, conv, delta_attention, gated_delta, ssd)
FLIPS = {
    "+": "-",
    "-": "+",
    "*": "+",
    "/": "*",
    "%": "/",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "&&": "||",
    "||": "&&",
    "+=": "-=",
    "-=": "+=",
    "*=": "+=",
}
BINARY = re.compile(r"(?<=[\w)\]] )([-+*/%]=?|[<>]=?|[=!]=|&&|\|\|)(?= )")
UNARY = re.compile(r"(?<=[(,=:?] )-(?=[\w(])|(?<=\()-(?=[\w(])|!(?=\w)")
SECONDS = 30  # of the CPU for one mutant; a loop may have lost its end
# Mutants that no check can catch, as (file, the changed line): why. They count as missed.
EQUIVALENT = {
    (
        "conv.metal",
        "window[j] = i < K + 1 ? static_cast<float>(state[(b * (K - 1) + i) * C + c])",
    ): "inputs K - 1 and K are in no window: the first run ends before them, the second begins "
    "after them",
}


def mutants(text: str) -> list[tuple[int, str, str]]:
    """(line, its new text, the whole new text) for every operator outside of comments."""
    found = []
    start = 0
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        code = line.split("//")[0]
        if not code.startswith("#"):
            for match in [*BINARY.finditer(code), *UNARY.finditer(code)]:
                i, j = match.span()
                changed = line[:i] + FLIPS.get(match[0], "") + line[j:]
                if match.re is UNARY:
                    changed = line[:i] + line[j:]
                new = text[:start] + changed + text[start + len(line) :]
                found.append((number, changed.strip(), new))
        start += len(line)
    return found


def kernels_of(file: str, new: str) -> dict[str, source.Source]:
    """The kernels whose text is another where that file's text is new, by name."""
    files = kernel_files()
    changed = {**files, file: new}
    before, after = (
        {name: k for text in x.values() for name, k in source.cut(text, x.__getitem__).items()}
        for x in (files, changed)
    )
    return {name: kernel for name, kernel in after.items() if kernel != before[name]}


@functools.cache
def kernel_files() -> dict[str, str]:
    """The text of each .metal file."""
    folder = resources.files("mlx_sleep.kernels")
    names = sorted(f.name for f in folder.iterdir() if f.name.endswith(".metal"))
    return {name: (folder / name).read_text() for name in names}


def run_checks(names: list[str]) -> None:
    """The checks of these kernels, until one fails."""
    watched = build.WATCHED
    # A backward pass runs the prefill kernel for its checkpoints.
    backward = [n.replace("prefill", "backward") for n in names if "prefill" in n]
    for name in dict.fromkeys([*names, *backward]):
        for i, check in enumerate(CHECKS[name]):
            # The first check is short: what it saves at the compiler is more than it loses.
            build.WATCHED = tuple("-O0" if i == 0 and f == "-O1" else f for f in watched)
            check()


def prepare(folder: str, queue) -> None:
    """In a process of its own: all checks pass, and what mutants share is compiled into folder."""
    build.cache_folder = lambda: Path(folder)
    run_checks(list(CHECKS))
    queue.put("passed")


def judge(kernels: dict[str, source.Source], compiled: str, queue) -> None:
    """In a process of its own: puts "missed", "caught" or "no mutant"."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 5))
    with tempfile.TemporaryDirectory() as folder:
        for path in Path(compiled).iterdir():
            (Path(folder) / path.name).symlink_to(path)
        build.cache_folder = lambda: Path(folder)
        real = source.kernel
        changed = {name: source.build(kernel) for name, kernel in kernels.items()}

        def kernel(path, name):
            return changed.get(name) or real(path, name)

        for module in KERNELS:
            module.kernel = kernel
        try:
            run_checks(list(kernels))
            result = "missed"
        except (AssertionError, harness.KernelError):
            result = "caught"
        except RuntimeError as error:
            if "does not compile" not in str(error):
                raise
            result = "no mutant"
        queue.put(result)


def in_a_process(context, target, *args) -> str:
    """What target(*args, queue) puts; "caught" where a signal ends it: a crash, or SECONDS."""
    queue = context.SimpleQueue()
    process = context.Process(target=target, args=(*args, queue))
    process.start()
    process.join()
    if not queue.empty():
        return queue.get()
    # Nobody but the system kills (-9), for want of memory; that says nothing of the mutant.
    if process.exitcode < 0 and process.exitcode != -signal.SIGKILL:
        return "caught"
    sys.exit(f"a check ended with {process.exitcode}, and no result: see above")


class Results:
    """What earlier runs found, one JSON line each, under a hash of mutant, checks and harness."""

    def __init__(self):
        deciding = [
            HERE / "kernel_checks.py",
            HERE.parent / "ops_reference.py",
            Path(build.__file__),
        ]
        for module in (harness, *KERNELS):
            deciding.append(Path(module.__file__))
        deciding += [build.HERE / name for name in ("msl.h", "runtime.h", "runtime.cpp")]
        self._basis = "\0".join(path.read_text() for path in deciding)
        self._file = build.cache_folder().parent / "mutants.jsonl"
        self._known = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                key, result = json.loads(line)
                self._known[key] = result

    def key(self, kernels: dict[str, source.Source]) -> str:
        text = "\0".join([self._basis, *map(repr, kernels.values())])
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def get(self, key: str) -> str | None:
        return self._known.get(key)

    def add(self, key: str, result: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a") as file:
            file.write(json.dumps([key, result]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="one .metal file; default: all")
    parser.add_argument("--sample", type=int, help="so many of them, by chance")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    # The server has imported everything once and forks a process for each mutant.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlx_sleep", "tests.metal.kernel_checks"])
    todo = []
    for file, text in kernel_files().items():
        if args.file in (None, file):
            todo += [(file, line, shown, new) for line, shown, new in mutants(text)]
    if args.sample:
        todo = random.sample(todo, min(args.sample, len(todo)))
    counts = {"caught": 0, "missed": 0, "no mutant": 0}
    results = Results()

    with tempfile.TemporaryDirectory() as compiled, ThreadPoolExecutor(args.jobs) as pool:
        if in_a_process(context, prepare, compiled) != "passed":
            sys.exit("the checks fail before anything is changed: see test_kernels_all.py")

        def run(job):
            file, _, _, new = job
            kernels = kernels_of(file, new)
            key = results.key(kernels)
            result = results.get(key)
            if result is None:
                result = in_a_process(context, judge, kernels, compiled)
                results.add(key, result)
            return job, result

        for (file, line, shown, _), result in pool.map(run, todo):
            counts[result] += 1
            print(f"{sum(counts.values())} of {len(todo)}", end="\r", file=sys.stderr)
            if result == "missed":
                why = EQUIVALENT.get((file, shown))
                reason = f"  (equivalent: {why})" if why else ""
                print(f"missed  {file}:{line}  {shown}{reason}", flush=True)
    print(f"{counts['no mutant']} did not compile")
    print(f"{counts['caught']} caught, {counts['missed']} missed")


if __name__ == "__main__":
    main()
