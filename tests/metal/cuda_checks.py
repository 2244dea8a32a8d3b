"""Runs the checks of kernel_checks.py on an NVIDIA GPU, alone and under compute-sanitizer.

    python -m tests.metal.cuda_checks [--report kernels/REPORT-CUDA.md]

The kernels' own text is compiled by nvcc (harness/cuda.py). Needs a GPU, nvcc and
compute-sanitizer, all in the CUDA toolkit. No GPU has run this script yet.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import argparse
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

from mlx_sleep.kernels import source

from .harness import cuda
from .kernel_checks import CHECKS

assert mlx_sleep  # imported for its effect
FAILED = 9  # compute-sanitizer's exit status where it found something
TOOLS = {
    "no tool": [],
    # Leaks of the process are no finding; every buffer is freed by the launch that made it.
    "memcheck": ["--tool", "memcheck"],
    "racecheck": ["--tool", "racecheck", "--racecheck-report", "all"],
    "synccheck": ["--tool", "synccheck"],
    "initcheck": ["--tool", "initcheck"],
}


def inside() -> None:
    """All checks, on the GPU."""
    source.without_metal = cuda.metal_kernel
    for name, checks in CHECKS.items():
        for check in checks:
            check()
        print(name, flush=True)


def run(tool: str, options: list[str]) -> str:
    """ "passed", or what went wrong in a line."""
    command = [sys.executable, "-m", "tests.metal.cuda_checks", "--inside"]
    if options:
        command = ["compute-sanitizer", *options, "--error-exitcode", str(FAILED), *command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout.count("\n") >= len(CHECKS):
        return "passed"
    print(done.stdout, done.stderr, file=sys.stderr)
    reached = sum(name in done.stdout.split() for name in CHECKS)
    found = "the tool found something" if done.returncode == FAILED else "a check failed"
    return f"{found}; {reached} of {len(CHECKS)} kernels passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="write the results as Markdown into this file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        return inside()
    missing = [
        name for name in ("nvidia-smi", "nvcc", "compute-sanitizer") if not shutil.which(name)
    ]
    if missing:
        sys.exit(f"not found: {', '.join(missing)}; this needs an NVIDIA GPU and the CUDA toolkit")
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    device = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    results = {}
    for tool, options in TOOLS.items():
        results[tool] = run(tool, options)
        print(f"{tool}: {results[tool]}", flush=True)
    if args.report:
        lines = [
            "# The Metal kernels' text on an NVIDIA GPU",
            "",
            f"{datetime.now(timezone.utc):%Y-%m-%d}, {device}, {version.splitlines()[-1]}.",
            "Written by `python -m tests.metal.cuda_checks --report`.",
            "",
            "| tool of compute-sanitizer | " + ", ".join(CHECKS) + " |",
            "| --- | --- |",
            *(f"| {tool} | {result} |" for tool, result in results.items()),
        ]
        args.report.write_text("\n".join(lines) + "\n")
    sys.exit(any(result != "passed" for result in results.values()))


if __name__ == "__main__":
    main()
