"""The command line of tests.fuzz, and `run`, which the tests call."""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Result:
    """counts of "refused" and "accepted", and faults as (number of the case, what)."""

    counts: Counter = field(default_factory=Counter)
    faults: list[tuple[int, str]] = field(default_factory=list)


def run(
    kind: str,
    numbers: list[int],
    seed: int = 0,
    seconds: float = 60.0,
    on_case: Callable[[int], None] = lambda done: None,
) -> Result:
    """The cases of a kind, in worker processes one after the other: one dies with a bad case."""
    result = Result()
    left = list(reversed(numbers))
    with tempfile.TemporaryDirectory() as folder:
        while left:
            with _Worker(kind, seed, folder) as worker:
                while left:
                    number = left.pop()
                    what = worker.run(number, seconds)
                    if what.startswith("fault"):
                        result.faults.append((number, what.removeprefix("fault: ")))
                    else:
                        result.counts[what] += 1
                    on_case(len(numbers) - len(left))
                    if worker.dead:
                        break
    return result


class _Worker:
    """A worker process, killed where a case does not end."""

    def __init__(self, kind: str, seed: int, folder: str):
        command = [sys.executable, "-m", "tests.fuzz.worker", kind, str(seed), folder]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,  # a line that is read already is one that `select` doesn't see
            start_new_session=True,  # Ctrl-C is the parent's
        )
        self.dead = False

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def run(self, number: int, seconds: float) -> str:
        """What came of a case."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(b"%d\n" % number)
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._died()
        wait = 180.0  # for the imports and the sound files
        while True:
            if not select.select([self._process.stdout], [], [], wait)[0]:
                self.dead = True
                return f"fault: not done after {wait:.0f} s"
            line = self._process.stdout.readline().decode()
            if not line:
                return self._died()
            word, _, rest = line.strip().partition(" ")
            if word == "end":
                return rest.partition(" ")[2]
            wait = seconds

    def _died(self) -> str:
        self.dead = True
        code = self._process.wait()
        if code < 0:
            return f"fault: {signal.Signals(-code).name}"
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"fault: the process ended with {code}: {' '.join(last)}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, help="one kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    bad = 0
    for kind in [options.only] if options.only else TARGETS:
        numbers = list(range(options.first, options.first + options.count))

        def show(done: int, kind: str = kind) -> None:
            if sys.stderr.isatty():
                print(f"\r{kind} {done}/{options.count}", end="", file=sys.stderr, flush=True)

        result = run(kind, numbers, options.seed, on_case=show)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        print(f"{kind}: {dict(result.counts)}, {len(result.faults)} faults", flush=True)
        for number, what in result.faults:
            print(f"  --only {kind} --seed {options.seed} --first {number} --count 1: {what}")
        bad += len(result.faults)
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
