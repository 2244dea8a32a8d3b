"""Durable memory: contents, refusals, locks and permissions. Crashes are in test_memory_crash,
earlier versions' files in test_memory_format_1."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.memory import database as memory_database
from mlx_sleep.memory import format as memory_format
from mlx_sleep.memory import location as memory_location
from mlx_sleep.utils.errors import UserError

ROOT = Path(memory.__file__).parents[2]
SLEEP = {"passes": 2, "eviction": "hard", "window": 64}
BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def bits(array: mx.array) -> tuple:
    return array.dtype, array.shape, np.array(array.view(BITS[array.dtype.size])).tobytes()


def some_arrays() -> dict[str, mx.array]:
    return {
        "layers.1.fast_weights": mx.random.normal((1, 2, 3, 4)),
        "layers.0.keys": mx.random.normal((1, 2, 5, 4)).astype(mx.bfloat16),
        "layers.0.valid": mx.random.bernoulli(0.5, (1, 5)),
    }


def ids(n: int) -> list[int]:
    return [random.randrange(1, 2**32) for _ in range(n)]


def make(home, name="ada", fingerprint="model-a") -> tuple[dict[str, mx.array], list[int]]:
    """A memory that slept once: two tokens were left over, three came since."""
    arrays, tokens = some_arrays(), ids(9)
    with Memory.open(name, fingerprint, model="some/model", home=home) as m:
        m.append(tokens[:5], "user", "My cat is Mia.")
        m.append(tokens[5:6], "assistant", "Nice.")
        m.commit(arrays, 4, **SLEEP)
        m.append(tokens[6:], "user", "Is she grey?")
    return arrays, tokens[4:]


def check(home, name, arrays, pending, fingerprint="model-a") -> memory.Header:
    with Memory.open(name, fingerprint, home=home) as m:
        assert {n: bits(a) for n, a in m.arrays.items()} == {n: bits(a) for n, a in arrays.items()}
        assert m.pending == pending
        return m.header


def files(home) -> dict[str, bytes]:
    """What lies there. -shm holds nothing, nor does an empty -wal. Not while this process has a
    memory open: its locks would go when the file is closed here."""
    found = {p.name: p.read_bytes() for p in sorted((Path(home) / "memories").iterdir())}
    return {n: b for n, b in found.items() if not n.endswith("-shm") and (b or n[-4:] != "-wal")}


def held(home, name="ada") -> tuple:
    """What the database holds, by another connection."""
    contents = memory_location.Location.of(name, home).load()
    arrays = {n: bits(a) for n, a in contents.arrays.items()}
    return contents.header, arrays, contents.pending, contents.messages, contents.settings


def refused(home, match, name="ada", fingerprint="model-a", **options) -> None:
    """Opening is refused with one line, and no file is touched."""
    before = files(home)
    with pytest.raises(UserError, match=match) as info:
        Memory.open(name, fingerprint, home=home, **options)
    assert "\n" not in str(info.value)
    assert files(home) == before


# Contents


def test_round_trip(tmp_path):
    arrays, pending = make(tmp_path)
    header = check(tmp_path, "ada", arrays, pending)
    assert (header.tokens, header.sleeps, header.passes) == (4, 1, 2)
    assert (header.eviction, header.window, header.model) == ("hard", 64, "some/model")
    assert header.created.endswith("+00:00") and header.updated >= header.created


def test_counters_add_up_and_leftovers_stay_pending(tmp_path):
    tokens = ids(20)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append(tokens[:10])
        m.commit(some_arrays(), 7, **SLEEP)
        m.append(tokens[10:])
        last = some_arrays()
        m.commit(last, 5, passes=4, eviction="sliding", window=9)
        assert m.pending == tokens[12:]
    header = check(tmp_path, "ada", last, tokens[12:])
    assert (header.tokens, header.sleeps, header.passes, header.window) == (12, 2, 4, 9)


@st.composite
def any_array(draw):
    dtype = draw(st.sampled_from(list(memory_format.DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    size = int(np.prod(shape)) * dtype.size
    raw = draw(st.binary(min_size=size, max_size=size))
    if dtype == mx.bool_:
        raw = bytes(b & 1 for b in raw)
    return mx.array(np.frombuffer(raw, f"u{dtype.size}").reshape(shape)).view(dtype)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda n: n not in ("pending", "__metadata__")),
        any_array(),
        max_size=4,
    )
)
def test_every_dtype_and_shape_survives_to_the_bit(tmp_path_factory, arrays):
    home = tmp_path_factory.mktemp("home")
    with Memory.open("ada", "model-a", home=home) as m:
        m.append([1, 2])
        m.commit(arrays, 2, **SLEEP)
    check(home, "ada", arrays, [])


def test_what_was_said_and_settings(tmp_path):
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        said = [(x.role, x.text, x.position) for x in m.messages]
        assert said[0] == ("user", "My cat is Mia.", 0)
        assert said[1:] == [("assistant", "Nice.", 5), ("user", "Is she grey?", 6)]
        m.append([1], "assistant", None)  # no transcript is kept
        m.set("system", "Be kind.")
        m.set("other", "x")
        m.set("other", None)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        assert m.messages[-1].text is None and len(m.messages) == 4
        assert m.settings == {"system": "Be kind."}
        m.forget()
        assert m.messages == [] and m.settings == {"system": "Be kind."}
    raw = b"".join(files(tmp_path).values())
    assert b"Be kind" in raw and b"Mia" not in raw and b"grey" not in raw


def test_undo(tmp_path):
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        assert m.undo() is None
    arrays, pending = make(tmp_path, "bob")
    with Memory.open("bob", "model-a", home=tmp_path) as m:
        before = held(tmp_path, "bob")
        m.append([1, 2, 3])
        second = some_arrays()
        m.commit(second, 6, **SLEEP)  # in the middle of a reply
        m.append([4], "assistant", "Yes.")
        assert m.undo() == "turn"
        assert m.pending == pending[:2] and m.header.sleeps == 1
        assert {n: bits(a) for n, a in m.arrays.items()} == before[1]
        assert [x.text for x in m.messages] == ["My cat is Mia.", "Nice."]
        m.append([9, 9], "user", "Again")
        m.commit(second, 4, **SLEEP)
        assert m.undo() == "sleep"
        assert m.pending == [*pending[:2], 9, 9] and len(m.messages) == 3
        assert m.undo() == "turn"
        assert m.pending == pending[:2]
        assert m.undo() is None  # the state before the first sleep went with the second
    header = check(tmp_path, "bob", arrays, pending[:2])
    assert (header.tokens, header.sleeps) == (4, 1)


def test_undo_of_the_first_sleep(tmp_path):
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([1, 2], "user", "a")
        m.append([3], "assistant", "b")
        m.sync()
        m.append([4], "user", "c")
        m.commit(some_arrays(), 4, **SLEEP)
        assert m.undo() == "sleep"
        assert (m.header.sleeps, m.header.tokens, m.header.passes) == (0, 0, 0)
        assert m.undo() == "turn" and m.pending == [1, 2, 3]
        assert m.undo() == "turn" and m.pending == []
        assert m.undo() is None
    check(tmp_path, "ada", {}, [])


def test_what_cannot_be_stored_is_refused_and_nothing_changes(tmp_path):
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([5, 6])
        m.sync()
        before = held(tmp_path)
        for tokens in ([7, -1], [2**32], [1.5]):
            with pytest.raises(ValueError, match="token ids"):
                m.append(tokens)
        with pytest.raises(ValueError, match="complex64"):
            m.commit({"a": mx.array([1j])}, 1, **SLEEP)
        with pytest.raises(ValueError, match="pending"):
            m.commit({"pending": mx.array([1.0])}, 1, **SLEEP)
        for count in (0, 3):
            with pytest.raises(ValueError, match="2 are pending"):
                m.commit(some_arrays(), count, **SLEEP)
        assert held(tmp_path) == before and m.pending == [5, 6]
    with pytest.raises(ValueError, match="closed"):
        m.append([1])
    with pytest.raises(ValueError, match="closed"):
        m.forget()


def test_forget_starts_again_under_the_same_name(tmp_path):
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.forget()
        assert (m.arrays, m.pending) == ({}, [])
        m.append([3])
    header = check(tmp_path, "ada", {}, [3])
    assert (header.tokens, header.sleeps, header.model) == (0, 0, "some/model")


# Refusals


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


# Locks, folders, permissions

HOLD = """
import sys
from mlx_sleep.memory import Memory
with Memory.open("ada", "model-a", home=sys.argv[1]) as m:
    print("open", flush=True)
    if sys.stdin.read():
        m.append([1])
"""


def spawn(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


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


def test_how_it_is_opened(tmp_path):
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        for pragma, value in [
            ("journal_mode", "wal"),
            ("synchronous", 2),
            ("fullfsync", 1),
            ("trusted_schema", 0),
            ("secure_delete", 1),
            ("foreign_keys", 1),
            ("application_id", memory_database.APPLICATION_ID),
            ("user_version", 1),
        ]:
            assert m._db.execute(f"PRAGMA {pragma}").fetchone() == (value,), pragma
        with pytest.raises(sqlite3.OperationalError):
            m._db.execute("SELECT load_extension('x')")


# The other commands


def test_list_shows_the_damaged_ones_as_damaged(tmp_path):
    assert memory.list_memories(tmp_path / "none") == []
    _, pending = make(tmp_path)
    make(tmp_path, "cut")
    folder = tmp_path / "memories"
    (folder / "cut.sqlite").write_bytes((folder / "cut.sqlite").read_bytes()[:-5000])
    (folder / "new.sqlite").touch()  # a process died while it made a memory
    (folder / "no memory at all.sqlite").write_text("")
    ada, cut = memory.list_memories(tmp_path)
    assert (ada.name, ada.problem, ada.pending, ada.messages) == ("ada", None, len(pending), 3)
    assert ada.header.sleeps == 1 and ada.header.tokens == 4
    assert ada.bytes >= (folder / "ada.sqlite").stat().st_size
    assert "damaged" in cut.problem and cut.header is None
    assert memory.show_memory("ada", tmp_path).header == ada.header
    for name in ("eve", "new"):
        with pytest.raises(UserError, match=f"there is no memory '{name}'"):
            memory.show_memory(name, tmp_path)


def test_fork(tmp_path):
    arrays, pending = make(tmp_path)
    before = files(tmp_path)
    memory.fork("ada", "eve", tmp_path)
    header = check(tmp_path, "eve", arrays, pending)
    assert (header.parent, header.tokens) == ("ada", 4)
    with Memory.open("eve", "model-a", home=tmp_path) as m:
        m.append([1])
        m.commit(some_arrays(), 6, **SLEEP)
    assert {n: b for n, b in files(tmp_path).items() if n in before} == before
    for target in ("ada", "eve"):
        with pytest.raises(UserError, match="exists already"):
            memory.fork("ada", target, tmp_path)
    with pytest.raises(UserError, match="there is no memory 'bob'"):
        memory.fork("bob", "new", tmp_path)
    assert not any(name.startswith(("bob", "new")) for name in files(tmp_path))


def test_export_and_import(tmp_path):
    arrays, pending = make(tmp_path)
    out = tmp_path / "ada.safetensors"
    memory.export_memory("ada", out, tmp_path)
    memory.import_memory(out, "bob", tmp_path / "elsewhere")
    header = check(tmp_path / "elsewhere", "bob", arrays, pending)
    assert header.sleeps == 1 and header.fingerprint == "model-a"
    assert held(tmp_path / "elsewhere", "bob")[3:] == held(tmp_path)[3:]  # what was said, too
    loaded, metadata = mx.load(str(out), return_metadata=True)  # plain safetensors
    assert loaded.pop("pending").size == len(pending)
    assert {n: bits(a) for n, a in loaded.items()} == {n: bits(a) for n, a in arrays.items()}
    assert metadata["fingerprint"] == "model-a" and metadata["sleeps"] == "1"

    exported = out.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        memory.export_memory("ada", out, tmp_path)
    with pytest.raises(UserError, match="exists already"):
        memory.import_memory(out, "ada", tmp_path)
    with pytest.raises(UserError, match="choose a file in a folder"):
        memory.export_memory("ada", tmp_path / "no" / "folder", tmp_path)
    with pytest.raises(UserError, match="check the path"):
        memory.import_memory(tmp_path / "nothing", "eve", tmp_path)
    assert out.read_bytes() == exported
    check(tmp_path, "ada", arrays, pending)

    out.write_bytes(exported[:-1])
    with pytest.raises(UserError, match="is damaged .*; export it again"):
        memory.import_memory(out, "eve", tmp_path)
    assert set(files(tmp_path)) == {"ada.sqlite"}


def test_remove(tmp_path):
    make(tmp_path)
    make(tmp_path, "bob")
    folder = tmp_path / "memories"
    (folder / "ada.sqlite").write_text("damaged")
    memory.remove("ada", tmp_path)
    assert set(files(tmp_path)) == {"bob.sqlite"}
    with pytest.raises(UserError, match="there is no memory 'ada'"):
        memory.remove("ada", tmp_path)
    memory.remove("bob", tmp_path)
    assert list(folder.iterdir()) == []
