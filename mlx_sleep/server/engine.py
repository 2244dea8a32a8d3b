"""The thread that runs the model: replies in turn, and sleep when nothing is asked.

Jobs are started in the order in which they came, one at a time a memory and a few at once in all;
those under way take turns token by token, so that a long reply holds nobody up. When none is left,
the memories with something in their window sleep, each after its own idle time; a new job cancels
that within one block of the model. What nobody uses any more is put away.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator

from ..sleep import SleepCancelled
from ..utils.errors import UserError
from .jobs import Failed, Job, sleep
from .sessions import Sessions, Slot
from .wire import ApiError

AT_ONCE = 4
"""Replies that take turns. Each has a KV cache in RAM; `Sessions` must keep as many."""

QUEUED, QUEUED_A_MEMORY = 64, 4
"""Jobs that may wait, in all and for one memory."""

UNUSED = 300.0
"""Seconds after which a session that has slept is put away, so that a chat may open its memory."""

ASK_AGAIN = 30.0
"""Seconds until `may_sleep` is asked again."""


class Engine:
    """Does jobs on `sessions`.

    idle       seconds without a request after which a memory sleeps; 0 is never
    may_sleep  why it must not sleep now, or ""; asked before every sleep
    """

    def __init__(
        self, sessions: Sessions, *, idle: float = 10.0, may_sleep: Callable[[], str] = lambda: ""
    ):
        self.sessions = sessions
        self._idle, self._may_sleep = idle, may_sleep
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._running: list[tuple[Job, Generator[None]]] = []
        self._stopping = False
        self._asked = float("-inf")  # when may_sleep was asked last and said no
        self._gave_up: set[str] = set()  # memories whose sleep failed since they were last used
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def queued(self) -> int:
        """Jobs that wait or are under way."""
        return len(self._waiting) + len(self._running)

    def submit(self, job: Job) -> None:
        """Queues a job. ApiError 429 or 503 when too many wait; any thread may call it."""
        with self._changed:
            if self._stopping or not self._thread.is_alive():
                raise ApiError(503, "the server is stopping")
            if len(self._waiting) >= QUEUED:
                raise ApiError(503, "too many requests are waiting; try again later")
            of = Counter(waiting.memory for waiting in self._waiting)
            if job.memory is not None and of[job.memory] >= QUEUED_A_MEMORY:
                message = f"too many requests are waiting for memory '{job.memory}'"
                raise ApiError(429, f"{message}; try again when one is done")
            self._waiting.append(job)
            self._changed.notify()

    def stop(self) -> None:
        """Cuts what is under way, puts all sessions away, and returns when that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    # --- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._start_jobs()
                for job, work in list(self._running):
                    self._step(job, work)
                if not self._running and not self._waiting and not self._sleep_one():
                    self._put_away()
                    self._wait()
        finally:
            self._end()

    def _start_jobs(self) -> None:
        with self._changed:
            for job in list(self._waiting):
                if len(self._running) >= AT_ONCE:
                    break
                names = {running.memory for running, _ in self._running}
                if job.memory is None or job.memory not in names:
                    self._waiting.remove(job)
                    self._running.append((job, job.work(self.sessions)))
                    self._gave_up.discard(job.memory or "")

    def _step(self, job: Job, work: Generator[None]) -> None:
        """Does a step of a job, and forgets the job when it was the last one."""
        try:
            if job.cancelled.is_set():
                work.close()
            else:
                next(work)
                return
        except (StopIteration, SleepCancelled):
            pass
        except (ApiError, UserError) as error:
            job.emit(Failed(error))
        except Exception as error:  # a fault of ours must not end the others' replies
            traceback.print_exc()
            job.emit(Failed(error))
        self._running.remove((job, work))

    def _sleep_one(self) -> bool:
        """Sleeps in the memory that has waited longest, if one is due. Whether one was."""
        due = [slot for slot in self._sleepers() if self._due(slot) <= time.monotonic()]
        if not due or time.monotonic() < self._asked + ASK_AGAIN:
            return False
        if reason := self._may_sleep():
            self._asked = time.monotonic()
            for slot in due:
                slot.waits = reason
            return False
        slot = min(due, key=lambda slot: slot.used)
        slot.waits = ""
        try:
            sleep(slot, lambda: bool(self._waiting) or self._stopping)
        except SleepCancelled:
            slot.used = time.monotonic()
        except UserError as error:
            slot.waits = str(error)
            self._gave_up.add(slot.name or "")
        except Exception:
            traceback.print_exc()
            self._gave_up.add(slot.name or "")
        return True

    def _sleepers(self) -> list[Slot]:
        """Guests' sessions don't sleep before they must: nobody may come back to one."""
        return [
            slot
            for slot in self.sessions.slots
            if self._idle
            and slot.name is not None
            and slot.name not in self._gave_up
            and slot.session.can_sleep
            and slot.session.pending
        ]

    def _due(self, slot: Slot) -> float:
        return slot.used + self._idle

    def _unused(self) -> list[Slot]:
        """What has nothing to sleep over, or never will sleep."""
        sleepers = self._sleepers()
        return [slot for slot in self.sessions.slots if slot not in sleepers]

    def _put_away(self) -> None:
        for slot in self._unused():
            if slot.used + UNUSED <= time.monotonic():
                try:
                    self.sessions.drop(slot)
                except UserError as error:
                    traceback.print_exception(error)

    def _wait(self) -> None:
        """Until a job comes, a sleep is due, or something is to be put away."""
        sleep = min(map(self._due, self._sleepers()), default=float("inf"))
        away = min((slot.used + UNUSED for slot in self._unused()), default=float("inf"))
        left = min(max(sleep, self._asked + ASK_AGAIN), away) - time.monotonic()
        with self._changed:
            if not self._waiting and not self._stopping:
                self._changed.wait(None if left == float("inf") else max(left, 0.0))

    def _end(self) -> None:
        with self._changed:
            self._stopping = True
            waiting, self._waiting = self._waiting, []
        stopping = ApiError(503, "the server is stopping")
        for job, work in self._running:
            try:
                work.close()
            except Exception:
                traceback.print_exc()
            job.emit(Failed(stopping))
        self._running = []
        for job in waiting:
            job.emit(Failed(stopping))
        try:
            self.sessions.close()
        except UserError as error:
            traceback.print_exception(error)
