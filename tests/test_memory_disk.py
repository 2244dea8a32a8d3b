"""Where memories lie: folders, permissions, a full disk."""

from __future__ import annotations

import os
import shutil
import sqlite3

import mlx.core as mx
import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.memory import database as memory_database
from mlx_sleep.memory import location as memory_location
from mlx_sleep.utils.errors import UserError
from tests.memories import SLEEP, check, held, make, spawn


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_private_whatever_the_umask(tmp_path, umask):
    home = tmp_path / "new" / "home"
    before = os.umask(umask)
    try:
        make(home)
        memory.export_memory("ada", tmp_path / "out", home)
        with Memory.open("ada", "model-a", home=home):
            found = {p: p.stat().st_mode & 0o777 for p in (tmp_path / "new").rglob("*")}
    finally:
        os.umask(before)
    assert {p.suffix for p in found} == {"", ".sqlite", ".sqlite-wal", ".sqlite-shm"}
    for path, mode in found.items():
        assert mode == (0o700 if path.is_dir() else 0o600), path
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600


def test_where_memories_live(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_SLEEP_HOME", str(tmp_path / "env"))
    assert memory.data_dir(tmp_path / "option") == tmp_path / "option"
    assert memory.data_dir() == tmp_path / "env"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert memory.data_dir("~/here") == tmp_path / "here"
    monkeypatch.setenv("MLX_SLEEP_HOME", "")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert memory.data_dir().name == "mlx-sleep" and tmp_path in memory.data_dir().parents


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("mine")
    for home in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="MLX_SLEEP_HOME"):
            Memory.open("ada", "model-a", home=home)
        with pytest.raises(UserError, match="MLX_SLEEP_HOME"):
            memory.list_memories(home)
    assert (tmp_path / "file").read_text() == "mine"


FULL = """
import resource, sys
from mlx_sleep.memory import Memory
import mlx.core as mx
m = Memory.open("ada", "model-a", home=sys.argv[1])
pending = m.pending[:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
m.append([1], "user", "more")
for call in (
    m.sync,
    lambda: m.commit({"s": mx.arange(9)}, 1, passes=1, eviction="hard", window=8),
    m.undo,
    m.forget,
    lambda: m.set("system", "x"),
    m.sync,
):
    try:
        call()
        print("done")
    except Exception as error:
        print(type(error).__name__, error)
    assert m.pending == [*pending, 1] and m.messages[-1].text == "more" and m.settings == {}
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
m.close()
"""


def test_a_full_disk(tmp_path):
    arrays, pending = make(tmp_path)
    with spawn(FULL, tmp_path, 4000) as child:
        out, err = child.communicate()
    assert child.returncode == 0, err
    lines = out.splitlines()
    assert len(lines) == 6 and all(line.startswith("UserError cannot write") for line in lines)
    check(tmp_path, "ada", arrays, [*pending, 1])


def test_a_full_disk_says_so(tmp_path):
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([1])
        size = m._db.execute("PRAGMA page_count").fetchone()[0]
        m._db.execute(f"PRAGMA max_page_count = {size}")
        with pytest.raises(UserError, match="No space left .*; free some space there"):
            m.commit({"s": mx.zeros(9999)}, 1, **SLEEP)
        assert m.header.sleeps == 1 and len(m.pending) == 6
    assert held(tmp_path)[2][-1] == 1


def test_a_full_disk_on_which_no_log_can_be_opened_says_so(tmp_path, monkeypatch):
    make(tmp_path)
    location, usage = memory_location.Location.of("ada", tmp_path), shutil.disk_usage(tmp_path)
    for free, words in ((0, "No space left .*; free some space"), (10**9, "disk I/O error; check")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with (
            pytest.raises(UserError, match=words),
            location.errors("read"),
            memory_database.sqlite_errors(),
        ):
            raise sqlite3.OperationalError("disk I/O error")


def test_the_folder_vanishes(tmp_path):
    make(tmp_path)
    m = Memory.open("ada", "model-a", home=tmp_path)
    for path in (tmp_path / "memories").iterdir():
        path.unlink()
    (tmp_path / "memories").rmdir()
    m.append([1])
    for call in (m.sync, m.close):
        with pytest.raises(UserError, match="was moved or deleted while in use"):
            call()
    assert m.closed
