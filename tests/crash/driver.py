"""Plays a session's writes once for each call that changes a file, under disk.c (LD_PRELOAD).

    python -m tests.crash.driver FOLDER CODE FIRST STRIDE

CODE: 0 to die at the call, else the errno that it gives. FIRST, STRIDE: which calls, from 1. Each
time in a process of its own, forked before MLX has started any thread. Prints the last call that
there was; a failed check ends it with a traceback.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_sleep.memory import Memory
from mlx_sleep.utils.errors import UserError

SLEEP = {"passes": 1, "eviction": "hard", "window": 32}


def folded(count: int) -> dict[str, mx.array]:
    """The arrays after tokens 0 .. count-1 were folded in."""
    return {"fast_weights": mx.arange(1500).astype(mx.float32) * (count + 1)}


class Script:
    """A session's writes. Tokens count up from 0, so that a loss or a repetition shows."""

    def __init__(self, home: Path):
        self.home = home
        self.total = self.folded = self.synced = 0  # what the memory should hold now
        self.memory: Memory | None = None
        self.steps: list[Callable[[], None]] = [
            self.open,
            lambda: self.append(3),
            self.sync,
            lambda: self.append(4),
            lambda: self.commit(5),
            lambda: self.append(2),
            self.sync,
            lambda: self.commit(4),
            lambda: self.undo("sleep", 5, 9),
            lambda: self.undo("turn", 5, 7),
            lambda: self.commit(2),
            self.close,
            self.open,
            lambda: self.append(1),
            self.close,
        ]

    def open(self):
        self.memory = Memory.open("ada", "model-a", home=self.home)

    def append(self, n):
        self.memory.append(range(self.total, self.total + n), "user", str(self.total))
        self.total += n

    def sync(self):
        self.memory.sync()
        self.synced = self.total

    def commit(self, n):
        self.memory.commit(folded(self.folded + n), n, **SLEEP)
        self.folded += n
        self.synced = self.total

    def undo(self, what, folded, total):
        assert self.memory.undo() == what
        self.folded, self.total = folded, total
        self.synced = self.total

    def close(self):
        self.memory.close()
        self.synced = self.total


# (tokens folded in, heard) of the database after each change of the script; a step may make none.
STATES = [(0, 0), (0, 3), (5, 7), (5, 9), (9, 9), (5, 9), (5, 7), (7, 7), (7, 8)]


def read(home: Path) -> tuple[int, int]:
    """What the memory holds, which must fit these numbers."""
    with Memory.open("ada", "model-a", home=home) as m:
        count = m.header.tokens
        total = count + len(m.pending)
        assert m.pending == list(range(count, total))
        want = folded(count) if count else {}
        assert m.arrays.keys() == want.keys()
        for name, array in want.items():
            assert np.array_equal(np.array(m.arrays[name]), np.array(array))
        assert all(int(x.text) == x.position < total for x in m.messages)
        return count, total


def after_power_loss(home: Path, platter: Path, scratch: Path):
    """Homes as a power loss may leave them: of each file what was synced, or what was written."""
    now = home / "memories"
    names = ["ada.sqlite", "ada.sqlite-wal", "ada.sqlite-journal"]
    for folders in itertools.product((now, platter), repeat=len(names)):
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "memories").mkdir(parents=True)
        for folder, name in zip(folders, names, strict=True):
            if (folder / name).exists():
                shutil.copy(folder / name, scratch / "memories" / name)
        yield scratch


def in_a_child(work: Callable[[], None]) -> int:
    """Its exit status: 0, 9 when the disk ended it, 1 after a traceback."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def play(home: Path, until: Path) -> None:
    """Plays the script; the number of changes that are certain goes to the file `until`."""
    script, done = Script(home), 0
    for step in script.steps:
        step()
        if (script.folded, script.synced) != STATES[done]:
            done += 1
            assert (script.folded, script.synced) == STATES[done]
        until.write_text(str(done))


def check_after_death(home: Path, platter: Path, until: Path, scratch: Path) -> None:
    """The step that died is done, or it is as if it had not begun."""
    done = int(until.read_text()) if until.exists() else 0
    for lost in after_power_loss(home, platter, scratch):
        assert read(lost) in STATES[done : done + 2]
    assert read(home) in STATES[done : done + 2]
    with Memory.open("ada", "model-a", home=home) as m:
        heard = m.header.tokens + len(m.pending)
        m.append([heard], "user", str(heard))
    assert read(home)[1] == heard + 1


def play_with_a_failure(home: Path, platter: Path, scratch: Path) -> None:
    """A step that raises has changed nothing; the same step then succeeds."""
    script, failures = Script(home), 0
    for step in script.steps:
        try:
            step()
        except UserError:
            failures += 1
            m = script.memory
            if step == script.close:  # it has given the lock back all the same
                script.total = read(home)[1]
                continue
            if m and not m.closed:
                assert m.header.tokens == script.folded
                assert len(m.pending) == script.total - script.folded
            step()
            for lost in after_power_loss(home, platter, scratch):
                assert read(lost)[1] >= script.synced, (step, read(lost), script.synced)
    assert failures <= 1 and (script.folded, script.total) in ((7, 7), (7, 8))


def try_call(disk: ctypes.CDLL, folder: Path, code: int, k: int) -> bool:
    """Plays the script with this call; False when there are fewer calls."""
    home, platter, scratch = folder / "home", folder / "platter", folder / "scratch"
    until = folder / "until"
    for path in (home, platter):
        shutil.rmtree(path, ignore_errors=True)
    until.unlink(missing_ok=True)
    (home / "memories").mkdir(parents=True, mode=0o700)
    platter.mkdir()

    def arm(call: int) -> None:
        disk.disk_arm(*(os.fsencode(p) for p in (home / "memories", platter)), call, code)

    def work() -> None:
        arm(k)
        if code:
            play_with_a_failure(home, platter, scratch)
        else:
            play(home, until)
        there_is_one = disk.disk_calls() >= k
        arm(0)
        assert read(home)[0] == 7
        os._exit(0 if there_is_one else 3)

    status = in_a_child(work)
    assert status in (0, 3, 9), f"call {k}"
    if status == 9:
        checked = in_a_child(lambda: check_after_death(home, platter, until, scratch))
        assert checked == 0, f"after call {k}"
    return status != 3


def main() -> None:
    folder, (code, k, stride) = Path(sys.argv[1]), map(int, sys.argv[2:])
    disk = ctypes.CDLL(os.environ["LD_PRELOAD"])
    while try_call(disk, folder, code, k):
        k += stride
    print(k - stride)


if __name__ == "__main__":
    main()
