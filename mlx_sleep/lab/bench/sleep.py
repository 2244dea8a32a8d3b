"""What a sleep costs, and how soon it lets go of the prompt (`mlx-sleep bench sleep`)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from ...sleep import SleepCancelled, consolidate
from ..statistics import ratio
from ..timing import clock, interleave

PASSES = (1, 2, 4, 8)
REQUESTS = 10


def rows(
    model, passes: Sequence[int] = PASSES, tokens: int | None = None, repeats: int = 5
) -> Iterator[dict]:
    """A row for each N.

    passes            N
    tokens            the window that is slept over; None is the model's own length
    seconds           of the sleep, the median over rounds
    ratio_to_prefill  over N times the time of reading the same window once
    cancel_ms         from a request to stop until the sleep has returned: the longest of
                      REQUESTS, spread evenly over a sleep
    """
    tokens = tokens or model.sleep.window
    earlier, window = mx.random.randint(0, model.args.vocab_size, (2, 1, tokens))
    state, _ = consolidate(model, model.init_state(), earlier, 1)  # so that S isn't zero

    def sleep(N: int):
        return consolidate(model, state, window, N)[0]

    for N in passes:
        slept, read = interleave([clock(sleep, N), clock(model.hidden, window, state)], repeats)
        seconds = statistics.median(slept)
        yield {
            "passes": N,
            "tokens": tokens,
            "seconds": seconds,
            "ratio_to_prefill": ratio(slept, read) / N,
            "cancel_ms": 1e3 * _longest_cancel(model, state, window, N, seconds),
        }


def plot(rows: list[dict], axes) -> None:
    """Seconds of a sleep over N, beside N times the prefill."""
    passes = [row["passes"] for row in rows]
    axes.plot(passes, [row["seconds"] for row in rows], marker="o", label="sleep")
    prefills = [row["seconds"] / row["ratio_to_prefill"] for row in rows]
    axes.plot(passes, prefills, linestyle="--", label="N x prefill")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("passes N")
    axes.set_ylabel("seconds")
    axes.legend()


def _longest_cancel(model, state, window, passes: int, seconds: float) -> float:
    """Seconds from a request to stop until `consolidate` has returned, at the worst."""
    longest = 0.0
    for i in range(REQUESTS):
        request = time.perf_counter() + (i + 0.5) / REQUESTS * seconds

        def should_stop(request=request) -> bool:
            return time.perf_counter() >= request

        try:
            consolidate(model, state, window, passes, should_stop=should_stop)
        except SleepCancelled:
            pass
        # A sleep that was over before the request came kept nobody waiting.
        longest = max(longest, time.perf_counter() - request)
    return longest
