"""Transcripts: what is kept of a chat, undo, memories rebuilt from one, search."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import mlx.core as mx
import pytest

from mlx_sleep import memory as memories
from mlx_sleep.memory import Memory
from mlx_sleep.models.base import flatten_state
from mlx_sleep.rebuild import rebuild, turns, without
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_model, fake_tokenizer

MODEL, TOKENIZER = fake_model(), fake_tokenizer()
TOLD = ["My cat is called Mia.", "My dog is six.", "Mia is grey.", "I live in Lisbon."]


def opened(home, name="ada", **options) -> Session:
    memory = Memory.open(name, "fingerprint", home=home)
    return Session(MODEL, TOKENIZER, memory, max_tokens=5, **options)


def heard(memory: Memory) -> int:
    return memory.header.tokens + len(memory.pending)


def chat(home, **options) -> tuple[list[str], Memory]:
    with opened(home, **options) as session:
        replies = [session.ask(text) for text in TOLD]
        return replies, session.memory


def test_what_was_said_is_kept_with_the_replies_as_they_were_shown(tmp_path):
    replies, _ = chat(tmp_path)
    said = memories.transcript("ada", tmp_path)
    assert [m.role for m in said] == ["user", "assistant"] * 4
    assert [m.text for m in said[::2]] == TOLD
    assert [m.text for m in said[1::2]] == [reply.strip() for reply in replies]
    assert [m.position for m in said] == sorted(m.position for m in said)


def test_hear_is_kept_too(tmp_path):
    with opened(tmp_path) as session:
        session.hear("My cat is Mia.", "Lovely.")
        assert [m.text for m in session.memory.messages] == ["My cat is Mia.", "Lovely."]
        turn = TOKENIZER.turn("My cat is Mia.", first=True)
        assert session.memory.messages[1].position == len(turn + TOKENIZER.encode_text("Lovely."))


def test_no_transcript(tmp_path):
    _, memory = chat(tmp_path, transcript=False)
    assert {m.text for m in memories.transcript("ada", tmp_path)} == {None}
    raw = (tmp_path / "memories" / "ada.sqlite").read_bytes()
    assert b"Lisbon" not in raw
    with pytest.raises(UserError, match="heard more than its transcript tells"):
        turns(memory.messages, heard(memory), "ada")


def test_a_reply_that_was_stopped(tmp_path):
    with opened(tmp_path) as session:
        said = session.say("My cat is Mia.")
        first = next(said)
        said.close()
        assert session.memory.messages[-1].text == first.strip()


def test_a_process_killed_in_a_reply_leaves_a_turn_that_is_closed(tmp_path):
    with Memory.open("ada", "fingerprint", home=tmp_path) as memory:
        memory.append(TOKENIZER.turn("My cat is Mia.", first=True), "user", "My cat is Mia.")
        memory.append(TOKENIZER.encode_text("Love"))
    with opened(tmp_path) as session:
        assert [m.text for m in session.memory.messages] == ["My cat is Mia.", "Love"]


def same(a, b) -> bool:
    a, b = flatten_state(a), flatten_state(b)
    return a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]).item() for k in a)


def test_undo_goes_back_to_the_bit(tmp_path):
    with opened(tmp_path) as session:
        session.ask(TOLD[0])
        before, pending = session.snapshot, session.pending
        session.ask(TOLD[1])
        longer = session.pending
        session.sleep()
        assert session.undo() == "sleep"
        assert session.pending == longer and same(session.snapshot, before)
        assert session.stats().sleeps == 0
        assert session.undo() == "turn"
        assert session.pending == pending
        reply = session.ask(TOLD[2])
    with opened(tmp_path, "bob") as fresh:
        fresh.ask(TOLD[0])
        assert fresh.ask(TOLD[2]) == reply


def test_undo_without_a_memory_or_anything():
    assert Session(MODEL, TOKENIZER).undo() is None


def test_a_rebuilt_memory_is_what_reading_its_turns_gives(tmp_path):
    replies, memory = chat(tmp_path)
    pairs = turns(memory.messages, heard(memory), "ada")
    seen = []
    contents = rebuild(
        MODEL,
        TOKENIZER,
        memory.header,
        pairs,
        {"system": "x"},
        passes=3,
        window=40,
        on_turn=lambda done, all_: seen.append((done, all_)),
    )
    assert seen[-1] == (4, 4) and contents.settings == {"system": "x"}
    assert [m.text for m in contents.messages] == [m.text for m in memory.messages]
    session = Session(MODEL, TOKENIZER, passes=3, window=40)
    for text, reply in zip(TOLD, replies, strict=True):
        session.hear(text, reply.strip())
    assert (contents.header.passes, contents.header.sleeps) == (3, session.stats().sleeps)
    assert contents.header.sleeps > 0 and contents.header.window == 40
    state = flatten_state(session.snapshot)
    assert all(mx.array_equal(contents.arrays[k], state[k]).item() for k in state)
    assert contents.pending == list(session.pending)
    with opened(tmp_path) as live:
        live.replace(contents)
        assert live.pending == session.pending and live.stats().sleeps == session.stats().sleeps
        assert live.undo() == "turn"
        assert [m.text for m in live.memory.messages[::2]] == TOLD[:3]


def test_forgetting_a_text(tmp_path):
    _, memory = chat(tmp_path)
    pairs = turns(memory.messages, heard(memory), "ada")
    kept, gone = without(pairs, "mia")
    assert [t.text for t, _ in gone] == [TOLD[0], TOLD[2]]
    contents = rebuild(MODEL, TOKENIZER, memory.header, kept, {})
    with opened(tmp_path) as live:
        live.replace(contents)
    raw = b"".join(p.read_bytes() for p in (tmp_path / "memories").iterdir())
    assert b"Mia" not in raw and b"Lisbon" in raw


REBUILD = """
import sys, time
from mlx_sleep.memory import Memory
from tests.test_rebuild import MODEL, TOKENIZER, heard
from mlx_sleep.rebuild import rebuild, turns
with Memory.open("ada", "fingerprint", home=sys.argv[1]) as memory:
    pairs = turns(memory.messages, heard(memory), "ada")
    def on_turn(done, all_):
        print(done, flush=True)
        time.sleep(9) if done == 2 else None
    rebuild(MODEL, TOKENIZER, memory.header, pairs, {}, on_turn=on_turn)
"""


def test_a_rebuild_killed_halfway_has_lost_nothing(tmp_path):
    chat(tmp_path)
    sleeps = memories.show_memory("ada", tmp_path).header.sleeps
    with subprocess.Popen(
        [sys.executable, "-c", REBUILD, tmp_path], stdout=subprocess.PIPE, text=True
    ) as child:
        while child.stdout.readline() != "2\n":
            pass
        os.kill(child.pid, signal.SIGKILL)
    with opened(tmp_path) as session:
        assert [m.text for m in session.memory.messages[::2]] == TOLD
        assert session.stats().sleeps == sleeps


def test_memories_without_a_transcript_are_not_rebuilt():
    with pytest.raises(UserError, match="heard more than its transcript tells"):
        turns([], 5, "ada")
    assert turns([], 0, "ada") == []


@pytest.mark.parametrize("fts", [True, False])
def test_search(tmp_path, monkeypatch, fts):
    chat(tmp_path)
    if not fts:

        def connect(path, real=sqlite3.connect, **options):
            db = real(path, **options)
            if path == ":memory:":
                db.set_authorizer(lambda action, *_: 1 if action == 29 else 0)
            return db

        monkeypatch.setattr(sqlite3, "connect", connect)
    found = [m.text for m in memories.search("ada", 'mia "grey', tmp_path)]
    assert found == ["Mia is grey."]
    assert {m.text for m in memories.search("ada", "MIA", tmp_path)} >= {TOLD[0], TOLD[2]}
    assert (
        memories.search("ada", "zebra", tmp_path) == memories.search("ada", "...", tmp_path) == []
    )
