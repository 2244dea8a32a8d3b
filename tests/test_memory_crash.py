"""Durable memory through crashes: of the process at every call, of the machine, kill -9."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sleep.memory import Memory, database
from mlx_sleep.utils.errors import UserError
from tests.crash.driver import STATES, Script, folded, read

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def disk(tmp_path_factory) -> Path:
    """tests/crash/disk.c, to be put before SQLite's calls."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        pytest.skip("needs LD_PRELOAD and a C compiler")
    library = tmp_path_factory.mktemp("disk") / "disk.so"
    source = ROOT / "tests" / "crash" / "disk.c"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.mark.parametrize("code", [0, errno.EIO, errno.ENOSPC])
def test_process_or_machine_dies_or_the_disk_fails_at_any_call(tmp_path, disk, code):
    """Every 40th of the 240 calls, from a random one on; the driver's last argument 1 tries all."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.crash.driver", tmp_path, str(code)]
        + [str(random.randrange(1, 41)), "40"],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": str(disk)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 150


class Statements:
    """A connection; what `strike` raises before or after a statement, the memory gets."""

    count, strike = 0, None

    def __init__(self, db: sqlite3.Connection):
        self._db = db

    def __getattr__(self, name):
        return getattr(self._db, name)

    def execute(self, sql, *args):
        cls = Statements
        cls.count += 1
        number = cls.count
        if cls.strike:
            cls.strike(number, "before", sql)
        try:
            return self._db.execute(sql, *args)
        finally:
            if cls.strike:
                cls.strike(number, "after", sql)


@pytest.fixture
def statements(monkeypatch):
    real = database._connect
    monkeypatch.setattr(database, "_connect", lambda path, mode: Statements(real(path, mode)))

    def play(home, strike) -> Script:
        Statements.count, Statements.strike = 0, strike
        return Script(home)

    yield play
    Statements.strike = None


def statements_in(tmp_path, play) -> int:
    script = play(tmp_path / "whole", None)
    for step in script.steps:
        step()
    count = Statements.count
    assert read(tmp_path / "whole") == (script.folded, script.total) == STATES[-1]
    return count


def test_ctrl_c_at_any_statement(tmp_path, statements):
    """Memory and database agree on which sleeps were recorded, and every token heard is kept."""
    for k in random.sample(range(1, statements_in(tmp_path, statements)), 40):

        def strike(number, moment, sql, k=k):
            if (number, moment) == (k, "after"):
                raise KeyboardInterrupt

        home = tmp_path / str(k)
        script = statements(home, strike)
        with pytest.raises(KeyboardInterrupt):
            for step in script.steps:
                step()
        Statements.strike = None
        m = script.memory
        if m and not m.closed:  # the object goes on: one more turn, one more sleep
            count, heard = m.header.tokens, m.header.tokens + len(m.pending)
            assert heard in (script.total, script.total - 2, script.total + 1, script.total + 4)
            m.append(range(heard, heard + 2), "user", str(heard))
            m.sync()
            m.commit(folded(count + 1), 1, passes=1, eviction="hard", window=32)
            m.close()
            assert read(home) == (count + 1, heard + 2)
        else:
            assert read(home) in STATES


def test_any_statement_may_fail_once(tmp_path, statements):
    """A step that raises has changed nothing; the same step then succeeds."""
    for k in random.sample(range(1, statements_in(tmp_path, statements)), 40):

        def strike(number, moment, sql, k=k):
            if (number, moment) == (k, "before"):
                raise sqlite3.OperationalError("disk I/O error")

        home = tmp_path / str(k)
        script = statements(home, strike)
        for step in script.steps:
            try:
                step()
            except UserError as error:
                assert "disk I/O error" in str(error)
                m = script.memory
                if m and m.closed:
                    break
                if m:
                    assert m.header.tokens == script.folded
                    assert len(m.pending) == script.total - script.folded
                step()
        Statements.strike = None
        assert read(home) in STATES[-3:]


KILL_ME = """
import random, sys
import mlx.core as mx
from mlx_sleep.memory import Memory

def folded(count):
    return {"fast_weights": mx.arange(1500).astype(mx.float32) * (count + 1),
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
            time.sleep(random.uniform(0, 0.05))
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
