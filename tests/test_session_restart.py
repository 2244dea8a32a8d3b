"""A session and its memory: what a restart finds, and memories that are not the model's."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sleep.memory import Contents, Header, Memory, import_memory
from mlx_sleep.memory.format import encode_memory
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_model
from tests.sessions import END, MODEL, TOKENIZER, counters, fold, reopen, same, script, text


def test_after_a_sleep_and_a_restart_the_logits_are_the_same_to_the_bit(memory, tmp_path):
    session = Session(MODEL, TOKENIZER, memory)
    script(session, "ok")
    session.tell(text(25))
    session.close()
    other = reopen(tmp_path)
    assert same(session.state, other.state) and counters(other) == counters(session)
    question = mx.array([TOKENIZER.turn("who?", first=False)])
    assert mx.array_equal(MODEL(question, session.state)[0], MODEL(question, other.state)[0])
    other.close()


def test_pending_tokens_are_replayed_from_the_stored_state(memory, tmp_path):
    session = Session(MODEL, TOKENIZER, memory, window=200)
    for _ in range(2):
        script(session, text(10))
        session.tell(text(30))
        session.sleep()
    script(session, text(10))
    session.tell(text(20))
    session.close(sleep=False)
    other = reopen(tmp_path, window=200)
    assert other.pending == session.pending
    _, replayed = MODEL(mx.array([session.pending]), session.snapshot)
    assert same(replayed, other.state, tolerance=1e-4)
    assert not same(session.snapshot, other.state)
    other.close()


def test_a_journal_longer_than_the_window_sleeps_on_the_way(memory, tmp_path):
    tokens = TOKENIZER.turn("c" * 100, first=True) + END
    memory.append(tokens)
    memory.close()
    session = reopen(tmp_path, window=40)
    assert session.stats().sleeps == 2 and list(session.pending) == tokens[80:]
    expected = fold(fold(MODEL.init_state(), tokens[:40]), tokens[40:80])
    assert same(session.snapshot, expected)
    session.close()


@pytest.mark.parametrize("cut", [1, 3])
def test_a_reply_that_a_crash_cut_short_gets_its_end(memory, tmp_path, cut):
    turn = TOKENIZER.turn("hello", first=True)
    memory.append(turn + TOKENIZER.encode_text("well")[:cut])
    memory.close()
    for _ in range(2):  # and gets it once
        session = reopen(tmp_path)
        assert list(session.pending) == turn + TOKENIZER.encode_text("well")[:cut] + END
        session.close(sleep=False)


def test_a_turn_is_on_the_disk_before_its_reply_starts(memory, monkeypatch):
    session = Session(MODEL, TOKENIZER, memory)
    synced = []
    original = memory.sync
    monkeypatch.setattr(memory, "sync", lambda: (synced.append(list(memory.pending)), original()))
    script(session, "yes")
    pieces = session.say("hello")
    assert synced == [TOKENIZER.turn("hello", first=True)]
    list(pieces)
    assert synced[-1] == list(session.pending)


def test_a_turn_that_cannot_be_written_is_not_heard(memory, monkeypatch):
    session = Session(MODEL, TOKENIZER, memory)

    def full():
        raise UserError("the disk is full")

    monkeypatch.setattr(memory, "sync", full)
    for call in (session.say, lambda text: session.hear(text, "yes")):
        with pytest.raises(UserError, match="full"):
            call("hello")
        assert session.pending == () and memory.pending == memory.messages == []
    monkeypatch.undo()
    script(session, "yes")
    assert session.ask("hello") == "yes"
    assert session.pending == tuple(memory.pending)


def test_ctrl_c_right_after_an_append_keeps_session_and_journal_together(memory, monkeypatch):
    session = Session(MODEL, TOKENIZER, memory)
    append = memory.append

    def interrupted(*args):
        append(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(memory, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.say("hello")
    assert list(session.pending) == memory.pending == TOKENIZER.turn("hello", first=True)
    script(session, "ok")
    session.tell("again")
    session.sleep()
    assert not session.pending and not memory.pending


def test_forget(memory, tmp_path):
    session = Session(MODEL, TOKENIZER, memory)
    fresh = counters(session)
    script(session, "ok")
    session.tell("hello")
    session.sleep()
    session.tell("hello")
    session.forget()
    assert counters(session) == fresh and session.pending == ()
    assert same(session.state, MODEL.init_state())
    session.close()
    session.close()  # does nothing
    assert counters(reopen(tmp_path)) == fresh


def test_leaving_the_with_block_sleeps_but_not_after_an_error(memory, tmp_path):
    with pytest.raises(RuntimeError), Session(MODEL, TOKENIZER, memory) as session:
        script(session, "ok")
        session.tell("hello")
        raise RuntimeError
    with reopen(tmp_path) as session:
        assert session.pending and session.stats().sleeps == 0
    with reopen(tmp_path) as session:
        assert not session.pending and session.stats().sleeps == 1


# --- memories from elsewhere -----------------------------------------------------------------

SLIDING = fake_model(eviction="sliding", window=64)

CRAFTED = {
    "another shape": ("layers.1.fast_weights", lambda S: S[..., :-1], "is mlx.core.float32"),
    "another type": (
        "layers.1.fast_weights",
        lambda S: S.astype(mx.bfloat16),
        "not mlx.core.float",
    ),
    "no array of floats": ("layers.3.conv", lambda x: x.astype(mx.int32), "is mlx.core.int32"),
    "NaN": ("layers.3.fast_weights", lambda S: S + mx.nan, "NaN"),
    "infinite": ("layers.1.conv", lambda x: x + mx.inf, "infinite"),
    "a missing layer": ("layers.3.fast_weights", None, "not there"),
    "no offset": ("layers.0.offset", None, "not there"),
    "an offset before the cache": ("layers.0.offset", lambda n: n * 0, "no sleep leaves"),
    "values of another length": ("layers.2.values", lambda x: x[:, :, 1:], "no sleep leaves"),
    "no batch": ("layers.0.keys", lambda x: x[0], "is mlx.core.float32"),
    "one too many": ("layers.7.fast_weights", lambda _: mx.zeros((1, 2, 8, 8)), "one too many"),
    "no name of ours": ("S", lambda _: mx.zeros((1,)), "one too many"),
}


@pytest.mark.parametrize("name, change, reason", CRAFTED.values(), ids=CRAFTED)
def test_a_memory_with_a_state_that_no_sleep_leaves_is_refused(tmp_path, name, change, reason):
    with Session(SLIDING, TOKENIZER, Memory.open("test", "fp", home=tmp_path)) as session:
        session.tell("hello")
    with Memory.open("test", "fp", home=tmp_path) as memory:
        Session(SLIDING, TOKENIZER, memory).close()  # as it should be
    with Memory.open("test", "fp", home=tmp_path) as memory:
        arrays = dict(memory.arrays)
        old = arrays.pop(name, None)
        if change:
            arrays[name] = change(old)
        memory.append([5])
        memory.commit(arrays, 1, passes=1, eviction="sliding", window=64)
        with pytest.raises(UserError, match="memory 'test' is not one of this model") as caught:
            Session(SLIDING, TOKENIZER, memory)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_a_memory_with_tokens_beyond_the_embedding_is_refused(memory):
    memory.append([5, MODEL.vocab_rows - 1])
    Session(MODEL, TOKENIZER, memory)
    memory.append([MODEL.vocab_rows])
    with pytest.raises(UserError, match="tokens beyond the model's 360"):
        Session(MODEL, TOKENIZER, memory)


@pytest.mark.parametrize(
    "counters",
    ({"sleeps": 1}, {"sleeps": -1}, {"tokens": -5}, {"passes": -1}, {"tokens": 9, "sleeps": 1}),
)
def test_a_memory_whose_counters_tell_of_no_such_state_is_refused(tmp_path, counters):
    raw = encode_memory(Contents(Header("fp", **counters), {}, [5]))
    (tmp_path / "m.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match="lacks what every memory has|is not one of this model"):
        import_memory(tmp_path / "m.safetensors", "test", home=tmp_path)
        with Memory.open("test", "fp", home=tmp_path) as memory:
            Session(MODEL, TOKENIZER, memory)
