"""What a durable memory holds, from one process to the next. Crashes are in test_memory_crash,
earlier versions' files in test_memory_format_1."""

from __future__ import annotations

import sqlite3

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_sleep.memory import Memory
from mlx_sleep.memory import database as memory_database
from mlx_sleep.memory import format as memory_format
from tests.memories import SLEEP, bits, check, files, held, ids, make, some_arrays


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
