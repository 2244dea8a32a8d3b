"""Durable memory through crashes: of the process at every system call, of the machine, kill -9."""

from __future__ import annotations

import errno
import itertools
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.memory import Memory, journal, lock, store
from mlx_sleep.utils import atomic
from mlx_sleep.utils.errors import UserError

ROOT = Path(store.__file__).parents[2]
SLEEP = {"passes": 1, "eviction": "hard", "window": 32}


class Died(BaseException):
    """Stands for the end of the process."""


class Disk:
    """The os module as the memory sees it: fails at one call, and knows what is on the platter.

    fail: called with the call's number and name before ("before") and after ("after") each call
    that changes the disk; what it raises, the memory gets. With Died, every later call dies too.
    A file whose fsync failed has lost its pages: a later fsync succeeds and brings nothing back.
    """

    WATCHED = ("open", "write", "fsync", "replace", "unlink", "mkdir")

    def __init__(self, folder: Path, fail):
        self.folder, self.fail = folder, fail
        self.calls, self.dead = 0, False
        self.files: dict[int, int] = {}  # inode -> our number for the file, never used again
        self.synced: dict[int, bytes] = {}  # contents at the last fsync
        self.lost: set[int] = set()
        self.named: dict[str, int] = {}  # the folder at its last fsync
        self.descriptors: set[int] = set()  # open files

    def __getattr__(self, name):
        function = getattr(os, name)
        if name not in self.WATCHED:
            return function

        def call(*args):
            if self.dead:
                raise Died
            if name == "open" and not args[1] & os.O_EXCL:
                file = function(*args)
                self.descriptors.add(file)
                return file
            self.calls += 1
            try:
                try:
                    self.fail(self.calls, "before")
                except BaseException:
                    if name == "write":  # the worst moment is in the middle
                        function(args[0], args[1][: len(args[1]) // 2])
                    if name == "fsync":
                        self.lost.add(self.files.get(os.fstat(args[0]).st_ino))
                    raise
                try:
                    # The disk is our own account of it, so that no test waits for a real one.
                    result = None if name == "fsync" else function(*args)
                    self._note(name, args, result)
                finally:
                    self.fail(self.calls, "after")
                return result
            except Died:
                self.dead = True
                raise

        return call

    def close(self, file: int) -> None:
        self.descriptors.discard(file)
        os.close(file)

    def end_of_process(self) -> None:
        """What the system does then: it closes the files, which unlocks them."""
        while self.descriptors:
            os.close(self.descriptors.pop())

    def _note(self, name, args, result):
        if name == "open":
            self.descriptors.add(result)
            number = len(self.synced)
            self.files[os.fstat(result).st_ino] = number
            self.synced[number] = b""
        if name == "fsync":
            info = os.fstat(args[0])
            if stat.S_ISDIR(info.st_mode):
                if self.folder.exists() and os.path.samestat(info, self.folder.stat()):
                    self.named = self._names()
                return
            number = self.files[info.st_ino]
            if number not in self.lost:
                (path,) = [p for p in self.folder.iterdir() if p.stat().st_ino == info.st_ino]
                self.synced[number] = path.read_bytes()

    def _names(self) -> dict[str, int]:
        if not self.folder.exists():
            return {}
        found = {p.name: p.stat().st_ino for p in self.folder.iterdir()}
        return {name: self.files[ino] for name, ino in found.items() if ino in self.files}

    def after_power_loss(self, scratch: Path) -> Iterator[Path]:
        """Homes as a power loss may leave them: synced contents only; each name that changed
        since the folder was synced has changed or has not."""
        now = self._names()
        names = sorted(now.keys() | self.named.keys())
        for choice in itertools.product(*({now.get(n), self.named.get(n)} for n in names)):
            shutil.rmtree(scratch, ignore_errors=True)
            (scratch / "memories").mkdir(parents=True)
            for name, number in zip(names, choice, strict=True):
                if number is not None:
                    (scratch / "memories" / name).write_bytes(self.synced[number])
            yield scratch


def put_under(patch: pytest.MonkeyPatch, system) -> None:
    """Makes `system`, a Disk or os, what the memory and its files call."""
    for module in (journal, lock, atomic):
        patch.setattr(module, "os", system)


def folded(count: int) -> dict[str, mx.array]:
    """The arrays after tokens 0 .. count-1 were folded in."""
    return {"fast_weights": mx.arange(500).astype(mx.float32) * (count + 1)}


class Script:
    """A session's writes. Tokens count up from 0, so that a loss or a repetition shows."""

    def __init__(self, home: Path):
        self.home = home
        self.total = self.folded = 0  # what the memory should hold now
        self.synced = 0
        self.memory: Memory | None = None
        self.steps = [
            self.open,
            lambda: self.append(3),
            lambda: self.append(4),
            self.sync,
            lambda: self.commit(5),
            lambda: self.append(2),
            self.sync,
            lambda: self.append(1),
            lambda: self.commit(5),
            self.close,
            self.open,
            lambda: self.append(6),
            lambda: self.commit(3),
            lambda: self.commit(1),
            self.sync,
            self.close,
            self.open,
            lambda: self.commit(1),
            lambda: self.append(2),
            self.close,
        ]

    def open(self):
        self.memory = Memory.open("ada", "model-a", home=self.home)

    def append(self, n):
        self.memory.append(range(self.total, self.total + n))
        self.total += n

    def sync(self):
        self.memory.sync()
        self.synced = self.total

    def commit(self, n):
        self.memory.commit(folded(self.folded + n), n, **SLEEP)
        self.folded += n
        self.synced = self.total

    def close(self):
        self.memory.close()
        self.synced = self.total


def read(home: Path) -> tuple[int, int]:
    """(tokens folded in, tokens in all) of the memory; what it holds must fit these numbers."""
    with pytest.MonkeyPatch.context() as patch:
        put_under(patch, os)  # no Disk while we look
        with Memory.open("ada", "model-a", home=home) as m:
            count = m.header.tokens
            total = count + len(m.pending)
            assert m.pending == list(range(count, total))
            want = folded(count) if count else {}
            assert m.arrays.keys() == want.keys()
            for name, array in want.items():
                assert np.array_equal(np.array(m.arrays[name]), np.array(array))
            return count, total


def play(home: Path, monkeypatch, fail) -> tuple[Disk, Script, tuple[int, int]]:
    """Plays the script to its end or to Died; also returns what the memory held before the step
    that died."""
    disk, script = Disk(home / "memories", fail), Script(home)
    before = (0, 0)
    with monkeypatch.context() as patch:
        put_under(patch, disk)
        try:
            for step in script.steps:
                before = (script.folded, script.total)
                step()
        except Died:
            pass
        finally:
            disk.end_of_process()
    return disk, script, before


def calls_in(tmp_path, monkeypatch) -> int:
    disk, script, _ = play(tmp_path / "whole", monkeypatch, lambda *_: None)
    assert read(tmp_path / "whole") == (script.folded, script.total) == (15, 18)
    assert disk.calls > 60
    return disk.calls


@pytest.mark.parametrize("when", ["before", "after"])
def test_process_or_machine_dies_at_any_call(tmp_path, monkeypatch, when):
    for k in range(1, calls_in(tmp_path, monkeypatch) + 1):

        def fail(call, moment, k=k):
            if (call, moment) == (k, when):
                raise Died

        home = tmp_path / str(k)
        disk, script, before = play(home, monkeypatch, fail)
        assert disk.dead

        # The machine: what was synced is there, later writes may be.
        commits = {0, 5, 10, 13, 14, 15}
        for lost in disk.after_power_loss(tmp_path / "lost"):
            count, total = read(lost)
            assert count in commits and count >= script.folded
            assert total >= script.synced

        # The process: the step that died is done, or it is as if it had not begun.
        count, total = read(home)
        assert (count, total) in legal_after(before, script)
        with Memory.open("ada", "model-a", home=home) as m:
            m.append(range(total, total + 2))
        assert read(home) == (count, total + 2)
        assert not list((home / "memories").glob("*.tmp"))


def legal_after(before: tuple[int, int], script: Script) -> set[tuple[int, int]]:
    """before, or the state that an undisturbed run has after its next change."""
    states = [
        (0, 0),
        (0, 3),
        (0, 7),
        (5, 7),
        (5, 9),
        (5, 10),
        (10, 10),
        (10, 16),
        (13, 16),
        (14, 16),
        (15, 16),
        (15, 18),
    ]
    return set(states[states.index(before) :][:2])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_any_call_may_fail_once_and_the_step_be_repeated(tmp_path, monkeypatch, code):
    """A step that raises has changed nothing; the same step then succeeds."""
    for k in range(1, calls_in(tmp_path, monkeypatch) + 1):

        def fail(call, moment, k=k):
            if (call, moment) == (k, "before"):
                raise OSError(code, os.strerror(code))

        home = tmp_path / str(k)
        script = Script(home)
        failures, step_failed = 0, None
        with monkeypatch.context() as patch:
            disk = Disk(home / "memories", fail)
            put_under(patch, disk)
            for step in script.steps:
                try:
                    step()
                except UserError as error:
                    failures += 1
                    step_failed = step
                    assert os.strerror(code) in str(error)
                    if step != script.close:  # a close has given the lock back all the same
                        m = script.memory
                        if m and not m.closed:
                            assert m.header.tokens == script.folded
                            assert len(m.pending) == script.total - script.folded
                        step()
                        for lost in disk.after_power_loss(tmp_path / "lost"):
                            assert read(lost)[1] >= script.synced
        assert failures <= 1
        assert read(home) == (15, 18)
        if step_failed != script.close:
            for lost in disk.after_power_loss(tmp_path / "lost"):
                assert read(lost) == (15, 18)
        assert not list((home / "memories").glob("*.tmp"))


def test_ctrl_c_at_any_call(tmp_path, monkeypatch):
    """Memory and disk agree on which sleeps were recorded, and every token heard is kept."""
    for k in range(1, calls_in(tmp_path, monkeypatch) + 1):

        def fail(call, moment, k=k):
            if (call, moment) == (k, "after"):
                raise KeyboardInterrupt

        home = tmp_path / str(k)
        script = Script(home)
        with monkeypatch.context() as patch:
            disk = Disk(home / "memories", fail)
            put_under(patch, disk)
            with pytest.raises(KeyboardInterrupt):
                for step in script.steps:
                    step()
            m = script.memory
            if m and not m.closed:
                # The object goes on: one more turn, one more sleep if there is something to fold.
                held, count = m.header.tokens + len(m.pending), m.header.tokens
                m.sync()
                for lost in disk.after_power_loss(tmp_path / "lost"):
                    assert read(lost) == (count, held)
                m.append(range(held, held + 2))
                m.sync()
                for lost in disk.after_power_loss(tmp_path / "lost"):
                    assert read(lost) == (count, held + 2)
                m.commit(folded(count + 1), 1, **SLEEP)
                m.close()
                assert read(home) == (count + 1, held + 2)
            else:
                assert read(home)[1] >= script.synced


def test_twice_between_the_rename_and_the_new_journal(tmp_path, monkeypatch):
    """The old journal beside the new file is not folded in again, and is never two files old."""
    replace = store.replace_file

    def die_after(path, data):
        replace(path, data)
        if path.suffix == ".safetensors":
            raise Died

    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append(range(7))
    for count in (4, 6, 7):
        with monkeypatch.context() as patch:
            patch.setattr(store, "replace_file", die_after)
            with pytest.raises(Died), Memory.open("ada", "model-a", home=tmp_path) as m:
                patch.setattr(Memory, "sync", lambda self: None)  # a dead process syncs nothing
                m.commit(folded(count), count - m.header.tokens, **SLEEP)
        assert (tmp_path / "memories" / "ada.journal").read_bytes()
        assert read(tmp_path) == (count, 7)


KILL_ME = """
import random, sys
import mlx.core as mx
from mlx_sleep.memory import Memory

def folded(count):
    return {"fast_weights": mx.arange(500).astype(mx.float32) * (count + 1),
            "big": mx.full((1 << 18,), count, mx.float32)}

with Memory.open("ada", "model-a", home=sys.argv[1]) as m:
    while True:
        for _ in range(random.randrange(1, 4)):
            total = m.header.tokens + len(m.pending)
            m.append(range(total, total + random.randrange(1, 50)))
        m.sync()
        print(m.header.tokens, m.header.tokens + len(m.pending), flush=True)
        if random.random() < 0.7:
            n = random.randrange(1, len(m.pending) + 1)
            m.commit(folded(m.header.tokens + n), n, passes=1, eviction="hard", window=32)
"""


def test_kill_9(tmp_path):
    """kill -9 at random moments: no synced token is lost, none is folded in twice."""
    for _ in range(12):
        with subprocess.Popen(
            [sys.executable, "-c", KILL_ME, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            for _ in range(random.randrange(1, 12)):
                last = child.stdout.readline()
            time.sleep(random.uniform(0, 0.02))
            child.send_signal(signal.SIGKILL)
            last = [last, *child.stdout.read().splitlines()][-1]
        acknowledged = [int(n) for n in last.split()]
        with Memory.open("ada", "model-a", home=tmp_path) as m:
            count = m.header.tokens
            total = count + len(m.pending)
            assert m.pending == list(range(count, total))
            assert count >= acknowledged[0] and total >= acknowledged[1]
            if count:
                assert mx.array_equal(m.arrays["fast_weights"], folded(count)["fast_weights"])
                assert m.arrays["big"].min().item() == m.arrays["big"].max().item() == count
    assert m.header.sleeps > 0
