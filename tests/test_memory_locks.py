"""A memory in two processes, or twice in one."""

from __future__ import annotations

import os
import signal

import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.utils.errors import UserError
from tests.memories import check, held, make, spawn

HOLD = """
import sys
from mlx_sleep.memory import Memory
with Memory.open("ada", "model-a", home=sys.argv[1]) as m:
    print("open", flush=True)
    if sys.stdin.read():
        m.append([1])
"""


def test_one_process_at_a_time(tmp_path):
    arrays, pending = make(tmp_path)
    make(tmp_path, "bob")
    with spawn(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "open\n"
        for call in (
            lambda: Memory.open("ada", "model-a", home=tmp_path),
            lambda: memory.remove("ada", tmp_path),
        ):
            with pytest.raises(UserError, match=f"in use by process {holder.pid};"):
                call()
        listed = {m.name: m for m in memory.list_memories(tmp_path)}
        assert listed["ada"].problem is None and listed["ada"].pending == len(pending)
        memory.fork("ada", "eve", tmp_path)
        memory.export_memory("ada", tmp_path / "x", tmp_path)
        holder.send_signal(signal.SIGKILL)
    check(tmp_path, "ada", arrays, pending)
    check(tmp_path, "eve", arrays, pending)


def test_one_at_a_time_in_one_process(tmp_path):
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        for _ in range(2):
            with pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
                Memory.open("ada", "model-a", home=tmp_path)
        m.append([1])
        m.sync()
    check(tmp_path, "ada", m.arrays, m.pending)


def test_who_finds_the_lock_free_for_an_instant_does_not_take_it(tmp_path):
    """Between two transactions nobody holds the lock; the holder is written in the memory."""
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([1])
        m._db.execute("ROLLBACK")
        code = "from mlx_sleep.memory import Memory; import sys\n"
        code += "print('start', flush=True); Memory.open('ada', 'model-a', home=sys.argv[1])"
        with spawn(code, tmp_path) as other:
            other.stdout.readline()
            m.sync()
            assert other.wait() and m.pending[-1] == 1
    assert held(tmp_path)[2][-1] == 1


@pytest.mark.parametrize("gone", ["-shm", "-wal", ""])
def test_lost_files_lose_no_update(tmp_path, gone):
    """A process whose lock was deleted under it writes no more."""
    _, pending = make(tmp_path)
    with spawn(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "open\n"
        (tmp_path / "memories" / f"ada.sqlite{gone}").unlink()
        if gone == "-shm":
            with Memory.open("ada", "model-a", home=tmp_path) as m:
                m.append([5])
        _, err = holder.communicate("go")
        assert "ada.sqlite was moved or deleted while in use" in err
    if gone:
        assert held(tmp_path)[2] == [*pending, *([5] if gone == "-shm" else [])]
    else:
        assert memory.list_memories(tmp_path) == []
