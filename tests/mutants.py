"""Flips the operators of the Metal kernels, one at a time, and counts how many a check catches.

    python tests/mutants.py [--file conv.metal] [--sample 20] [--jobs 2]

Each changed kernel is compiled as it stands and runs its check of kernel_checks.py in a process of
its own. One that no longer compiles is no mutant and is not counted. Last line: N caught, M missed.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import argparse
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

from kernel_checks import CHECKS

from mlx_sleep.kernels import source
from mlx_sleep.kernels.harness import build

assert mlx_sleep  # imported for its effect
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
SECONDS = 120  # for one mutant; a loop may have lost its end


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


def kernels_of(text: str, new: str) -> list[str]:
    """The kernels whose text differs: one, or all where the shared text does."""
    before, after = source.cut(text), source.cut(new)
    return [name for name, kernel in before.items() if kernel != after[name]]


def check(file: str, new: str, names: list[str], queue) -> None:
    """In a process of its own: puts "missed", "caught" or "no mutant"."""
    with tempfile.TemporaryDirectory() as folder:
        seed = build.cache_folder()
        build.cache_folder = lambda: Path(folder)
        for runtime in seed.glob("runtime-*.o"):  # the only part that mutants share
            shutil.copy(runtime, folder)
        cut = source.cut(new)
        real = source.kernel
        changed = {name: source.build(cut[name]) for name in names}

        def kernel(path, name):
            return changed.get(name) or real(path, name) if path == file else real(path, name)

        from mlx_sleep.kernels import chunks, conv, gated_delta, ssd

        for module in (chunks, conv, gated_delta, ssd):
            module.kernel = kernel
        result = "missed"
        # A backward pass runs the prefill kernel for its checkpoints.
        backward = [n.replace("prefill", "backward") for n in names if "prefill" in n]
        for name in dict.fromkeys([*names, *backward]):
            try:
                CHECKS[name]()
            except Exception as error:
                result = "no mutant" if "does not compile" in str(error) else "caught"
                break
        queue.put(result)


def judge(file: str, new: str, names: list[str]) -> str:
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=check, args=(file, new, names, queue))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
        return "caught"
    return "caught" if queue.empty() else queue.get()  # empty: it crashed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", help="one .metal file; default: all")
    parser.add_argument("--sample", type=int, help="so many of them, by chance")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    for name in CHECKS:  # all of them must pass before any is changed
        CHECKS[name]()
    todo = []
    folder = resources.files("mlx_sleep.kernels")
    for file in sorted(f.name for f in folder.iterdir() if f.name.endswith(".metal")):
        if args.file in (None, file):
            text = (folder / file).read_text()
            todo += [(file, line, shown, text, new) for line, shown, new in mutants(text)]
    if args.sample:
        todo = random.sample(todo, min(args.sample, len(todo)))
    counts = {"caught": 0, "missed": 0, "no mutant": 0}

    def run(job):
        file, line, shown, text, new = job
        return job, judge(file, new, kernels_of(text, new))

    with ThreadPoolExecutor(args.jobs) as pool:
        for (file, line, shown, _, _), result in pool.map(run, todo):
            counts[result] += 1
            print(f"{sum(counts.values())} of {len(todo)}", end="\r", file=sys.stderr)
            if result == "missed":
                print(f"missed  {file}:{line}  {shown}", flush=True)
    print(f"{counts['no mutant']} did not compile")
    print(f"{counts['caught']} caught, {counts['missed']} missed")


if __name__ == "__main__":
    main()
