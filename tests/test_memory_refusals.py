"""Memories that are not opened: another model's, damaged ones, other files in their place."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
from pathlib import Path

import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.utils.errors import UserError
from tests.memories import held, make, refused, spawn


def test_another_model(tmp_path):
    make(tmp_path)
    refused(tmp_path, "another model .*some/model.*; load that model", fingerprint="model-b")
    refused(tmp_path, "rebuild .* --model new/one$", fingerprint="model-b", model="new/one")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", "-a", ".a", "a\n", "a b", "é", "a" * 65, "a\0"]
)
def test_names(tmp_path, name):
    calls = [
        lambda: Memory.open(name, "model-a", home=tmp_path),
        lambda: memory.remove(name, tmp_path),
        lambda: memory.show_memory(name, tmp_path),
        lambda: memory.export_memory(name, tmp_path / "x", tmp_path),
        lambda: memory.import_memory(tmp_path / "x", name, tmp_path),
        lambda: memory.fork(name, "b", tmp_path),
        lambda: memory.fork("b", name, tmp_path),
    ]
    for call in calls:
        with pytest.raises(UserError, match="cannot name a memory"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_every_flipped_byte_and_truncation(tmp_path):
    """It is refused and left alone, or nothing that it holds is in that byte."""
    make(tmp_path)
    path = tmp_path / "memories" / "ada.sqlite"
    good, whole = path.read_bytes(), held(tmp_path)
    used = [i for i in range(len(good)) if good[i] or i % 97 == 0]
    refusals = 0
    for i in random.sample(used, 300):
        flipped = bytearray(good)
        flipped[i] ^= random.randrange(1, 256)
        path.write_bytes(flipped)
        try:
            assert held(tmp_path) == whole, i
        except UserError as error:
            assert "\n" not in str(error)
            refusals += 1
            if refusals % 10 == 0:
                refused(tmp_path, "memory 'ada' (is damaged|has format)|cannot read")
        assert path.read_bytes() == flipped
    assert refusals > 150
    for cut in range(1, len(good) - 5000, 3000):
        path.write_bytes(good[:cut])
        refused(tmp_path, "memory 'ada' is damaged|cannot read")


def crashed(tmp_path) -> Path:
    """A memory whose process was killed: a sleep and two turns are in the log."""
    code = KILLED.format(turns=2)
    with spawn(code, tmp_path) as child:
        child.wait()
    return tmp_path / "memories" / "ada.sqlite-wal"


KILLED = """
import os, sys
import mlx.core as mx
from mlx_sleep.memory import Memory
from mlx_sleep.memory.store import Memory as Store
Store._checkpoint = lambda self: None
m = Memory.open("ada", "model-a", home=sys.argv[1])
m.append(range(5), "user", "My cat is Mia.")
m.commit({{"s": mx.arange(300)}}, 5, passes=1, eviction="hard", window=8)
for turn in range({turns}):
    m.append([turn, 9], "user", "Mia is grey.")
    m.sync()
os._exit(9)
"""


def test_a_damaged_log_is_refused_a_torn_one_cut(tmp_path):
    log = crashed(tmp_path)
    good, whole = log.read_bytes(), held(tmp_path)
    assert whole[0].sleeps == 1 and whole[2] == [0, 9, 1, 9]
    for i in [*range(0, 80), *random.sample(range(80, len(good)), 30)]:
        flipped = bytearray(good)
        flipped[i] ^= random.randrange(1, 256)
        log.write_bytes(flipped)
        try:
            assert held(tmp_path) == whole, i  # a field that nobody reads
        except UserError as error:
            assert "is damaged" in str(error) and "\n" not in str(error)
        assert log.read_bytes() == flipped
    log.write_bytes(flipped)
    refused(tmp_path, "checksum mismatch .*log")

    seen = set()
    for cut in range(len(good) - 2 * 4120, len(good), 1111):
        log.write_bytes(good[:cut])
        seen.add(tuple(held(tmp_path)[2]))
        zeros = min(-(-cut // 4096) * 4096, len(good) // 4096 * 4096)  # the rest did not arrive
        log.write_bytes(good[:zeros] + bytes(len(good) - zeros))
        seen.add(tuple(held(tmp_path)[2]))
    assert seen == {(0, 9)}
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([7])
    assert held(tmp_path)[2] == [0, 9, 7]


def test_a_log_alone_is_refused(tmp_path):
    crashed(tmp_path)
    (tmp_path / "memories" / "ada.sqlite").unlink()
    refused(tmp_path, "ada.sqlite-wal has no ada.sqlite beside it")
    memory.remove("ada", tmp_path)
    make(tmp_path)


def execute(path, statement) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)


def test_other_databases(tmp_path):
    make(tmp_path)
    path = tmp_path / "memories" / "ada.sqlite"
    good = path.read_bytes()
    for statement, match in [
        ("PRAGMA user_version = 7", "has format 7, this mlx-sleep reads format 1"),
        ("PRAGMA application_id = 7", "not made by mlx-sleep"),
        ("CREATE TABLE more (x)", "tables are not those"),
        ("CREATE TRIGGER t AFTER INSERT ON tokens BEGIN SELECT 1; END", "tables are not those"),
        ("DELETE FROM messages WHERE id = 2", "messages are missing"),
        ("DELETE FROM messages WHERE id = 3", "rows are missing"),
        ("DELETE FROM tokens WHERE start = 6", "lacks tokens"),
        ("DELETE FROM arrays WHERE rowid = 1", "arrays are missing"),
        ("DELETE FROM sleeps", "lacks"),
        ("DELETE FROM memory", "lacks"),
        ("UPDATE memory SET heard = heard + 1", "checksum mismatch"),
        ("UPDATE messages SET text = 'My cat is Ada.' WHERE id = 1", "checksum mismatch"),
        ("UPDATE sleeps SET tokens = '4x'", "checksum mismatch"),
    ]:
        path.write_bytes(good)
        execute(path, statement)
        refused(tmp_path, match)
    for file in path.parent.iterdir():
        file.unlink()
    execute(path, "CREATE TABLE x (y)")
    refused(tmp_path, "not made by mlx-sleep")


@pytest.mark.parametrize("name", ["ada.sqlite", "ada.sqlite-wal"])
def test_links_and_pipes_are_refused(tmp_path, name):
    make(tmp_path)
    path = tmp_path / "memories" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(UserError, match="is not a regular file"):
        Memory.open("ada", "model-a", home=tmp_path)
    path.unlink()
    (tmp_path / "mine").write_text("mine")
    path.symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="is not a regular file"):
        Memory.open("ada", "model-a", home=tmp_path)
    assert memory.list_memories(tmp_path)[0].problem
    memory.remove("ada", tmp_path)
    assert (tmp_path / "mine").read_text() == "mine"
