"""Memories as earlier versions kept them: read, made a database of, refused when damaged."""

from __future__ import annotations

import fcntl
import random
import shutil
import struct
import zlib
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory, store
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_model, fake_tokenizer
from tests.memories import bits, files

OLD = Path(__file__).parent / "data" / "memory_format_1"
TOKENIZER = fake_tokenizer()


@pytest.fixture
def home(tmp_path) -> Path:
    """Made at commit 3d397b4 by a session with the model of tests/fakes.py: two sleeps, then one
    turn in the journal."""
    shutil.copytree(OLD, tmp_path / "memories")
    return tmp_path


def pending() -> list[int]:
    said = (TOKENIZER.turn("And she is grey.", first=False), TOKENIZER.encode_text("Lovely."))
    return [*said[0], *said[1], *TOKENIZER.end_ids]


def refused(home, match) -> None:
    before = files(home)
    with pytest.raises(UserError, match=match) as info:
        Memory.open("old", "fingerprint", home=home)
    assert "\n" not in str(info.value)
    assert files(home) == before


def test_it_opens_and_goes_on(home):
    arrays = mx.load(str(OLD / "old.safetensors"))
    arrays.pop("pending")
    assert memory.show_memory("old", home).pending == len(pending())
    with Memory.open("old", "fingerprint", home=home) as m:
        header = m.header
        assert m.pending == pending() and m.messages == []
        assert {n: bits(a) for n, a in m.arrays.items()} == {n: bits(a) for n, a in arrays.items()}
    assert (header.tokens, header.sleeps, header.passes) == (57, 2, 2)
    assert (header.eviction, header.window, header.model) == ("hard", 64, "tiny")
    assert header.created == header.updated == "2026-11-26T14:31:13+00:00"
    assert set(files(home)) == {"old.sqlite"}

    with Session(fake_model(), TOKENIZER, Memory.open("old", "fingerprint", home=home)) as s:
        assert list(s.pending) == pending() and s.stats().fast_weight_bytes == 1024
    listed = memory.show_memory("old", home)
    assert (listed.header.tokens, listed.header.sleeps) == (57 + len(pending()), 3)


def test_fork_and_export_read_it(home):
    memory.fork("old", "new", home)
    memory.export_memory("old", home / "out", home)
    memory.import_memory(home / "out", "again", home)
    assert {"old.safetensors", "old.journal"} < set(files(home))
    for name in ("new", "again"):
        with Memory.open(name, "fingerprint", home=home) as m:
            assert m.pending == pending() and m.header.sleeps == 2
    memory.remove("old", home)
    assert set(files(home)) == {"new.sqlite", "again.sqlite"}


def test_killed_before_the_old_files_were_deleted(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(store.Memory, "_sign", lambda *_: None)
        patch.setattr("mlx_sleep.memory.format_1.OldFiles.remove_if", lambda *_: None)
        Memory.open("old", "fingerprint", home=home).close()
    assert set(files(home)) == {"old.sqlite", "old.safetensors", "old.journal"}
    with Memory.open("old", "fingerprint", home=home) as m:
        m.append([1])
    assert set(files(home)) == {"old.sqlite"}
    # Files of another memory of this name are none of the database's.
    shutil.copytree(OLD, home / "memories", dirs_exist_ok=True)
    raw = (home / "memories" / "old.safetensors").read_bytes()
    (home / "memories" / "old.safetensors").write_bytes(raw[:-1] + b"\1")
    with Memory.open("old", "fingerprint", home=home) as m:
        assert m.pending[-1] == 1
    assert (home / "memories" / "old.safetensors").exists()


def test_a_process_of_the_earlier_version_has_it_open(home):
    with (home / "memories" / "old.lock").open("w") as lock:
        lock.write("123")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by process 123;"):
            Memory.open("old", "fingerprint", home=home)
    Memory.open("old", "fingerprint", home=home).close()
    assert set(files(home)) == {"old.sqlite"}


def test_another_model(home):
    before = files(home)
    with pytest.raises(UserError, match="another model"):
        Memory.open("old", "other", home=home)
    assert files(home) == before


@pytest.mark.parametrize("name", ["old.safetensors", "old.journal"])
def test_a_flipped_byte(home, name):
    path = home / "memories" / name
    good = path.read_bytes()
    for i in random.sample(range(len(good)), 60):
        flipped = bytearray(good)
        flipped[i] ^= random.randrange(1, 256)
        path.write_bytes(flipped)
        refused(home, "memory 'old' (is damaged|has format)")


def test_a_torn_journal_loses_its_last_record_only(home):
    path = home / "memories" / "old.journal"
    good = path.read_bytes()
    seen = []
    for cut in range(len(good)):
        path.write_bytes(good[:cut])
        if cut < 44:  # its head, which is replaced as a whole
            refused(home, "journal of memory 'old' is damaged")
            continue
        seen.append(memory.show_memory("old", home).pending)
    path.write_bytes(good + bytes(20))  # it grew before its bytes arrived
    seen.append(memory.show_memory("old", home).pending)
    assert seen == sorted(seen) and seen[0] == 0 and len(set(seen)) > 2


def test_a_journal_of_another_file_or_of_none(home):
    folder = home / "memories"
    raw = (folder / "old.journal").read_bytes()
    (folder / "old.safetensors").rename(folder / "x")
    refused(home, "has no old.safetensors beside it")
    (folder / "x").rename(folder / "old.safetensors")
    with pytest.raises(UserError, match="exists already"):
        memory.import_memory(folder / "old.safetensors", "old", home)
    head = raw[:8] + bytes(32)  # the SHA-256 of another file
    (folder / "old.journal").write_bytes(head + struct.pack("<I", zlib.crc32(head)) + raw[44:])
    refused(home, "continues another file")
