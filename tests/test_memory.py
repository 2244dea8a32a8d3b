"""Durable memory: contents, refusals, locks and permissions. Crashes are in test_memory_crash."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import struct
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
from mlx_sleep.memory import format as memory_format
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_model, fake_tokenizer

ROOT = Path(memory.__file__).parents[2]
TOKENIZER = fake_tokenizer()
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
    """A memory that slept once: two tokens left over in the file, three journalled."""
    arrays, tokens = some_arrays(), ids(9)
    with Memory.open(name, fingerprint, model="some/model", home=home) as m:
        m.append(tokens[:6])
        m.commit(arrays, 4, **SLEEP)
        m.append(tokens[6:])
    return arrays, tokens[4:]


def check(home, name, arrays, pending, fingerprint="model-a") -> memory.Header:
    with Memory.open(name, fingerprint, home=home) as m:
        assert {n: bits(a) for n, a in m.arrays.items()} == {n: bits(a) for n, a in arrays.items()}
        assert m.pending == pending
        return m.header


def files(home) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((Path(home) / "memories").iterdir())}


def refused(home, match, name="ada", fingerprint="model-a") -> None:
    """Opening is refused with one line, and no file is touched."""
    before = files(home)
    with pytest.raises(UserError, match=match) as info:
        Memory.open(name, fingerprint, home=home)
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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
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


def test_the_file_is_plain_safetensors(tmp_path):
    arrays, _ = make(tmp_path)
    path = tmp_path / "memories" / "ada.safetensors"
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert loaded.pop("pending").size == 2
    assert {n: bits(a) for n, a in loaded.items()} == {n: bits(a) for n, a in arrays.items()}
    assert metadata["fingerprint"] == "model-a" and metadata["sleeps"] == "1"


OLD = Path(__file__).parent / "data" / "memory_format_1"


def test_a_memory_of_the_first_version_opens_and_goes_on(tmp_path):
    """Made at commit 3d397b4 by a session with the model of tests/fakes.py: two sleeps, then one
    turn in the journal."""
    folder = tmp_path / "memories"
    shutil.copytree(OLD, folder)
    arrays = mx.load(str(OLD / "old.safetensors"))
    arrays.pop("pending")
    said = (TOKENIZER.turn("And she is grey.", first=False), TOKENIZER.encode_text("Lovely."))
    pending = [*said[0], *said[1], *TOKENIZER.end_ids]
    header = check(tmp_path, "old", arrays, pending, "fingerprint")
    assert (header.tokens, header.sleeps, header.passes) == (57, 2, 2)
    assert (header.eviction, header.window, header.model) == ("hard", 64, "tiny")
    assert header.created == header.updated == "2026-11-26T14:31:13+00:00"

    with Session(fake_model(), TOKENIZER, Memory.open("old", "fingerprint", home=tmp_path)) as s:
        assert list(s.pending) == pending and s.stats().fast_weight_bytes == 1024
    listed = memory.show_memory("old", tmp_path)
    assert (listed.header.tokens, listed.header.sleeps) == (57 + len(pending), 3)


def test_what_cannot_be_stored_is_refused_and_nothing_changes(tmp_path):
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.append([5, 6])
        before = files(tmp_path)
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
        assert files(tmp_path) == before and m.pending == [5, 6]
    with pytest.raises(ValueError, match="closed"):
        m.append([1])
    with pytest.raises(ValueError, match="closed"):
        m.forget()


def test_forget_starts_anew_under_the_same_name(tmp_path):
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


def test_every_truncation_and_every_flipped_byte_of_the_memory_file(tmp_path):
    make(tmp_path)
    path = tmp_path / "memories" / "ada.safetensors"
    good = path.read_bytes()
    for i in range(len(good)):
        path.write_bytes(good[:i])
        refused(tmp_path, "memory 'ada' is damaged")
        flipped = bytearray(good)
        flipped[i] ^= random.randrange(1, 256)
        path.write_bytes(flipped)
        refused(tmp_path, "memory 'ada' (is damaged|has format)")
    path.write_bytes(good + b"\0")
    refused(tmp_path, "damaged")


def rewrite(path: Path, change) -> None:
    """Rewrites a memory file's JSON head, with a checksum that is right again."""
    raw = path.read_bytes()
    (size,) = struct.unpack_from("<Q", raw)
    head = json.loads(raw[8 : 8 + size])
    change(head)
    if "sha256" in (head.get("__metadata__") or {}):
        head["__metadata__"]["sha256"] = "0" * 64
    text = json.dumps(head, separators=(",", ":")).encode()
    new = struct.pack("<Q", len(text)) + text + raw[8 + size :]
    blank = b'"sha256":"' + b"0" * 64
    key = blank.replace(b"0" * 64, hashlib.sha256(new).hexdigest().encode())
    path.write_bytes(new.replace(blank, key, 1))


def test_other_formats_missing_keys_and_wrong_dtypes(tmp_path):
    arrays, _ = make(tmp_path)
    path = tmp_path / "memories" / "ada.safetensors"
    (tmp_path / "memories" / "ada.journal").unlink()
    good = path.read_bytes()
    rewrite(path, lambda head: None)
    with Memory.open("ada", "model-a", home=tmp_path) as m:  # what follows fails for its reason
        assert len(m.pending) == 2

    def without(key):
        return lambda head: head["__metadata__"].pop(key)

    def dtype(name, code):
        return lambda head: head[name].update(dtype=code)

    def version(text):
        return lambda head: head["__metadata__"].update(format_version=text)

    cases = [(without(key), "lacks") for key in ("fingerprint", "tokens", "sha256", "previous")]
    cases += [
        (version("2"), "has format 2, this mlx-sleep reads format 1"),
        (version("one"), "lacks"),
        (lambda head: head["__metadata__"].update(tokens="many"), "lacks"),
        (lambda head: head.update(__metadata__=None), "lacks"),
        (dtype("pending", "I32"), "lacks"),
        (lambda head: head.update(other=head.pop("pending")), "lacks"),
        (dtype("layers.0.valid", "F8_E4M3"), "dtype F8_E4M3"),
    ]
    for change, match in cases:
        path.write_bytes(good)
        rewrite(path, change)
        refused(tmp_path, match)
    mx.save_safetensors(str(path), arrays)
    refused(tmp_path, "damaged or not a memory")


# The journal


def journal_of(tmp_path, records: list[list[int]]) -> tuple[Path, list[int]]:
    """Writes a journal of these records; returns it and the file size after each of them."""
    path = tmp_path / "memories" / "ada.journal"
    sizes = []
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        for tokens in records:
            m.append(tokens)
            sizes.append(path.stat().st_size)
    return path, sizes


def test_a_torn_tail_loses_only_the_torn_record(tmp_path):
    records = [ids(n) for n in (3, 1, 7, 2)]
    path, sizes = journal_of(tmp_path, records)
    good, head = path.read_bytes(), sizes[0] - 12 - 4 * 3
    for cut in range(head, len(good) + 1):
        whole = sum(records[: sum(size <= cut for size in sizes)], [])
        path.write_bytes(good[:cut])
        with Memory.open("ada", "model-a", home=tmp_path) as m:
            assert m.pending == whole
            m.append([11, 12])  # what follows the torn record must be readable
        check(tmp_path, "ada", {}, [*whole, 11, 12])
    # A file that grew before its bytes arrived ends in zeros.
    path.write_bytes(good + bytes(random.randrange(1, 200)))
    check(tmp_path, "ada", {}, sum(records, []))
    for cut in range(head):
        path.write_bytes(good[:cut])
        refused(tmp_path, "journal of memory 'ada' is damaged")


def test_every_flipped_byte_of_the_journal(tmp_path):
    path, _ = journal_of(tmp_path, [ids(n) for n in (3, 1, 7, 2)])
    good = path.read_bytes()
    for i in range(len(good)):
        flipped = bytearray(good)
        flipped[i] ^= random.randrange(1, 256)
        path.write_bytes(flipped)
        refused(tmp_path, "journal of memory 'ada' is damaged .*; move")


def test_the_journal_of_another_memory_file(tmp_path):
    make(tmp_path)
    make(tmp_path, "bob")
    folder = tmp_path / "memories"
    (folder / "ada.journal").write_bytes((folder / "bob.journal").read_bytes())
    refused(tmp_path, "continues another file")
    (folder / "ada.safetensors").unlink()
    refused(tmp_path, "has no ada.safetensors beside it")
    with pytest.raises(UserError, match="exists already"):
        memory.fork("bob", "ada", tmp_path)
    memory.remove("ada", tmp_path)
    make(tmp_path)


def test_an_older_memory_file_put_back_is_refused(tmp_path):
    arrays, pending = make(tmp_path)
    path = tmp_path / "memories" / "ada.safetensors"
    old = path.read_bytes()
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        m.commit(some_arrays(), 3, **SLEEP)
        m.append([1])
    path.write_bytes(old)
    refused(tmp_path, "continues another file")


# Locks, folders, permissions

HOLD = """
import sys
from mlx_sleep.memory import Memory
with Memory.open("ada", "model-a", home=sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def spawn(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_one_process_at_a_time(tmp_path):
    arrays, pending = make(tmp_path)
    make(tmp_path, "bob")
    with spawn(HOLD, tmp_path) as holder:
        assert holder.stdout.readline() == "open\n"
        before = files(tmp_path)
        for call in (
            lambda: Memory.open("ada", "model-a", home=tmp_path),
            lambda: memory.fork("ada", "eve", tmp_path),
            lambda: memory.export_memory("ada", tmp_path / "x", tmp_path),
            lambda: memory.remove("ada", tmp_path),
        ):
            with pytest.raises(UserError, match=f"in use by process {holder.pid};"):
                call()
        assert files(tmp_path) == before
        listed = {m.name: m for m in memory.list_memories(tmp_path)}
        assert listed["ada"].problem is None and listed["ada"].pending == len(pending)
        holder.send_signal(signal.SIGKILL)
    check(tmp_path, "ada", arrays, pending)
    assert not (tmp_path / "memories" / "ada.lock").exists()


def test_a_lock_file_unlinked_by_its_last_holder_locks_nobody_out_or_in(tmp_path, monkeypatch):
    make(tmp_path)
    real, path = fcntl.flock, tmp_path / "memories" / "ada.lock"

    def flock(file, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with Memory.open("ada", "model-a", home=tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()};"):
            Memory.open("ada", "model-a", home=tmp_path)


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
    assert {p.suffix for p in found} == {"", ".safetensors", ".journal", ".lock"}
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


@pytest.mark.parametrize(
    "code, hint", [(errno.ENOSPC, "free some space"), (errno.EROFS, "MLX_SLEEP_HOME")]
)
def test_full_or_read_only_disk(tmp_path, monkeypatch, code, hint):
    arrays, pending = make(tmp_path)

    def fail(*_):
        raise OSError(code, os.strerror(code))

    with Memory.open("ada", "model-a", home=tmp_path) as m:
        before = files(tmp_path)
        for function in ("write", "replace", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, function, fail)
                for call in (
                    lambda: m.append([1]),
                    lambda: m.commit(some_arrays(), 1, **SLEEP),
                    m.forget,
                ):
                    with pytest.raises(UserError, match=hint):
                        call()
            assert files(tmp_path) == before
            assert m.pending == pending
        m.append([7])
    check(tmp_path, "ada", arrays, [*pending, 7])


def test_the_folder_vanishes(tmp_path):
    make(tmp_path)
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        for path in (tmp_path / "memories").iterdir():
            path.unlink()
        (tmp_path / "memories").rmdir()
        with pytest.raises(UserError, match="No such file"):
            m.append([1])


def test_fullfsync_where_there_is_one(monkeypatch, tmp_path):
    calls, works = [], True

    def control(file, command):
        calls.append(command)
        if not works:
            raise OSError(errno.ENOTTY, "no such thing")

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda file: calls.append("fsync"))
    with Memory.open("ada", "model-a", home=tmp_path) as m:
        assert set(calls) == {51}
        works = False
        calls.clear()
        m.append([1])
        m.sync()
    assert calls.count(51) == calls.count("fsync") > 0


# The other commands


def test_list_shows_the_damaged_ones_as_damaged(tmp_path):
    assert memory.list_memories(tmp_path / "none") == []
    _, pending = make(tmp_path)
    for name in ("bob", "cut"):
        make(tmp_path, name)
    folder = tmp_path / "memories"
    (folder / "cut.safetensors").write_bytes((folder / "cut.safetensors").read_bytes()[:-1])
    (folder / "bob.safetensors").unlink()
    (folder / "no memory at all.safetensors").write_text("")
    ada, bob, cut = memory.list_memories(tmp_path)
    assert (ada.name, ada.problem, ada.pending) == ("ada", None, len(pending))
    assert ada.header.sleeps == 1 and ada.header.tokens == 4
    assert ada.bytes == sum(
        (folder / f"ada.{e}").stat().st_size for e in ("safetensors", "journal")
    )
    assert "damaged" in cut.problem and cut.header is None
    assert "no bob.safetensors" in bob.problem
    assert memory.show_memory("ada", tmp_path) == ada
    with pytest.raises(UserError, match="there is no memory 'eve'"):
        memory.show_memory("eve", tmp_path)


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
    assert set(files(tmp_path)) == {"ada.safetensors", "ada.journal"}


def test_remove(tmp_path):
    make(tmp_path)
    make(tmp_path, "bob")
    folder = tmp_path / "memories"
    (folder / "ada.safetensors").write_text("damaged")
    (folder / "ada.safetensors.tmp").write_text("of a crash")
    memory.remove("ada", tmp_path)
    assert set(files(tmp_path)) == {"bob.safetensors", "bob.journal"}
    with pytest.raises(UserError, match="there is no memory 'ada'"):
        memory.remove("ada", tmp_path)
