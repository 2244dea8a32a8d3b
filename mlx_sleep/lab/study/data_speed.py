"""How fast the study's tasks make their batches (`mlx-sleep bench data`).

A training step takes as many tokens as one batch has, so the two rates tell whether the data is
the bottleneck: `mlx-sleep bench train` prints the other one. It is NumPy and Python on one core.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator, Sequence

from ..timing import clock, interleave
from .plan import TASKS, read_plan, sizes
from .task import make_task


def rows(repeats: int = 5, tasks: Sequence[str] = TASKS) -> Iterator[dict]:
    """A row for each plan of the package.

    task, size         the plan
    batch              examples of a batch
    tokens             of a batch, padding included: what is slept over and what is answered
    ms                 to make it, the median over `repeats` fresh batches
    tokens_per_second  tokens over that
    """
    for name in tasks:
        for size in sizes(name):
            plan = read_plan(name, size)
            task = make_task(plan)
            (times,) = interleave([clock(next, _batches(task, plan))], repeats)
            seconds = statistics.median(times)
            tokens = plan["batch"] * (task.windows * task.window + task.final_tokens)
            yield {
                "task": name,
                "size": size,
                "batch": plan["batch"],
                "tokens": tokens,
                "ms": 1000 * seconds,
                "tokens_per_second": round(tokens / seconds),
            }


def _batches(task, plan: dict) -> Iterator:
    """Training batches, one after the other."""
    difficulty = max(plan["difficulties"]) if task.trained_apart else None
    for start in itertools.count(0, plan["batch"]):
        yield task.batch("train", range(start, start + plan["batch"]), difficulty)


def plot(rows: list[dict], axes) -> None:
    """Tokens a second, a bar for each plan."""
    axes.barh(
        [f"{row['task']} {row['size']}" for row in rows], [r["tokens_per_second"] for r in rows]
    )
    axes.set_xscale("log")
    axes.set_xlabel("tokens a second")
