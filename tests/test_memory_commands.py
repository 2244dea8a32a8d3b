"""What is done to memories as wholes: list, fork, export, import, remove."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sleep import memory
from mlx_sleep.memory import Memory
from mlx_sleep.utils.errors import UserError
from tests.memories import SLEEP, bits, check, files, held, make, some_arrays


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
