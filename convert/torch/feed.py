"""Batches made ahead of time by worker processes, in order."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable

Batches = Callable[[int, int], dict]
"""(step, stage) -> the arrays of a batch: the same ones in every process."""

_batches: Batches | None = None  # of this worker


class Feed:
    """Gives the batch of each step; up to `ahead` further ones are being made meanwhile.

    make_batches: makes the Batches, once in each worker; it must be picklable when there are
    workers. With none, a batch is made when it's asked for.
    """

    def __init__(self, make_batches: Callable[[], Batches], workers: int = 0):
        self.ahead = workers + workers // 2
        self._waiting: deque = deque()
        if workers:
            # A fork would copy the state of CUDA and of PyTorch's threads.
            context = multiprocessing.get_context("spawn")
            self._pool = context.Pool(workers, _start, (make_batches,))
        else:
            self._pool, self._batches = None, make_batches()

    def ask(self, step: int, stage: int) -> None:
        """Orders a batch, to be taken after those that were ordered before."""
        if self._pool:
            self._waiting.append(self._pool.apply_async(_make, (step, stage)))
        else:
            self._waiting.append((step, stage))

    def take(self) -> dict:
        """The arrays of the batch that was ordered first; raises what its maker raised."""
        first = self._waiting.popleft()
        return first.get() if self._pool else self._batches(*first)

    def close(self) -> None:
        if self._pool:
            self._pool.terminate()
            self._pool.join()


def _start(make_batches: Callable[[], Batches]) -> None:
    import signal

    global _batches
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer to answer
    _batches = make_batches()


def _make(step: int, stage: int) -> dict:
    return _batches(step, stage)
