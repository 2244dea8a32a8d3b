"""A session asleep: windows, S, the KV cache, and sleeps that fail."""

from __future__ import annotations

import contextlib
import itertools
import threading

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep import window as window_module
from mlx_sleep.models.base import flatten_state
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.session import Session
from mlx_sleep.sleep import SleepCancelled, SleepFailed
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_config
from tests.sessions import END, MODEL, TOKENIZER, fold, same, script, text


def test_a_sleep_starts_from_the_snapshot_and_clears_the_kv(memory):
    session = Session(MODEL, TOKENIZER, memory, window=200)
    state, passes = MODEL.init_state(), []
    for sleeps in (1, 2):
        script(session, text(20))
        session.tell(text(30))
        working, window = session.state, session.pending
        assert session.stats().kv_bytes > 0
        passes.clear()
        report = session.sleep(on_pass=lambda *pass_: passes.append(pass_))
        state = fold(state, window)
        assert same(session.state, state) and not same(session.state, working)
        assert same(session.state, fold(working, window)) is False
        assert [pass_[:2] for pass_ in passes] == [(1, 2), (2, 2)]
        assert report.moved == tuple(pass_[2] for pass_ in passes)
        assert report.tokens == len(window) and report.kv_bytes_freed > 0
        assert session.stats().kv_bytes == 0 and session.pending == ()
        assert memory.header.sleeps == sleeps == session.stats().sleeps
        stored = {name: mx.array(x) for name, x in memory.arrays.items()}
        assert all(mx.array_equal(stored[n], x) for n, x in flatten_state(state).items())
    assert session.sleep() is None
    assert memory.header.tokens == session.stats().tokens > 100


@pytest.mark.parametrize("how", ["cancelled", "not finite", "disk full"])
def test_a_sleep_that_fails_changes_nothing(memory, tmp_path, monkeypatch, how):
    session = Session(MODEL, TOKENIZER, memory, window=200)
    script(session, "good")
    session.tell(text(20))
    session.sleep()
    script(session, "good")
    session.tell(text(20))
    before = (session.snapshot, session.state, session.pending, session.stats())
    files = {p: p.read_bytes() for p in (tmp_path / "memories").iterdir()}

    calls = itertools.count()
    options = {}
    if how == "cancelled":
        options["should_stop"] = lambda: next(calls) == 5  # in the second pass
        error = SleepCancelled
    elif how == "not finite":

        def fail(*_, **__):
            raise SleepFailed("not finite")

        monkeypatch.setattr(window_module, "consolidate", fail)
        error = UserError
    else:

        def full(*_, **__):
            raise UserError("the disk is full")

        monkeypatch.setattr(memory, "commit", full)
        error = UserError
    with pytest.raises(error):
        session.sleep(**options)
    monkeypatch.undo()

    assert (session.snapshot, session.state, session.pending, session.stats()) == before
    assert {p: p.read_bytes() for p in (tmp_path / "memories").iterdir()} == files
    expected = fold(session.snapshot, session.pending)
    assert session.sleep().tokens == before[3].window_tokens
    assert same(session.state, expected)


@contextlib.contextmanager
def watched_windows():
    """The tokens of every sleep in the block."""
    windows, original = [], window_module.consolidate

    def watched(model, state, tokens, *rest, **options):
        windows.append(tokens[0].tolist())
        return original(model, state, tokens, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_module, "consolidate", watched)
        yield windows


@settings(max_examples=15, deadline=None)
@given(
    window=st.integers(2, 16),
    turns=st.lists(st.tuples(st.integers(1, 36), st.integers(0, 24)), min_size=1, max_size=3),
)
def test_whatever_the_lengths_every_token_is_folded_in_once_in_windows_that_fit(window, turns):
    session, expected = Session(MODEL, TOKENIZER, window=window, passes=1), []
    with watched_windows() as windows:
        for heard, said in turns:
            turn, reply = "a" * heard, TOKENIZER.encode_text("b" * said)
            expected += TOKENIZER.turn(turn, first=not expected) + reply + END
            script(session, reply)
            session.ask(turn)
            assert session.stats().sleeps == len(windows)
            assert session.state[0].get("length", 0) <= min(window, len(session.pending))
        session.sleep()
    assert [token for tokens in windows for token in tokens] == expected
    assert all(0 < len(tokens) <= window for tokens in windows)
    assert session.stats().tokens == len(expected) and session.stats().window_tokens == 0

    state = MODEL.init_state()
    for tokens in windows:
        state = fold(state, tokens, passes=1)
    assert same(session.state, state)


def test_a_turn_that_does_not_fit_sleeps_first_and_starts_a_window():
    session = Session(MODEL, TOKENIZER, window=64)
    reports = []
    session.on_sleep = reports.append
    script(session, "ok")
    session.tell("a" * 30)
    first = len(session.pending)
    assert not reports
    script(session, "ok")
    session.tell("b" * 30)
    assert [report.tokens for report in reports] == [first]
    assert session.pending[0] == 2 and session.pending.count(2) == 1


def test_a_sleep_within_a_turn_is_watched_and_can_be_cancelled(memory):
    session = Session(MODEL, TOKENIZER, memory, passes=3, window=64)
    script(session, "yes")
    session.ask(text(50))
    held = session.pending
    passes: list[int] = []

    # The window sleeps to make room for the turn: cancelled, the turn is not taken.
    with pytest.raises(SleepCancelled):
        session.say(text(30), should_stop=lambda: True)
    assert session.pending == held == tuple(memory.pending) and memory.header.sleeps == 0

    # A turn longer than the window sleeps while it is read: cancelled, the turn is taken, its
    # reply ends at once, and what is left of the window goes on from where it was.
    long = text(150)
    replies = session.say(long, lambda done, *_: passes.append(done), lambda: len(passes) >= 5)
    assert passes == [1, 2, 3]  # room for the turn
    with pytest.raises(SleepCancelled):
        list(replies)
    assert passes == [1, 2, 3, 1, 2] and memory.header.sleeps == 1
    whole = [*TOKENIZER.turn(long, first=False), *END]
    assert list(session.pending) == whole == list(memory.pending)
    session.sleep()
    state = fold(MODEL.init_state(), held, 3)
    for at in range(0, len(whole), 64):
        state = fold(state, whole[at : at + 64], 3)
    assert same(session.snapshot, state)


def test_sleep_in_another_thread(memory):
    """Arrays cross threads only when they are evaluated; a chat sleeps in a second thread."""
    model = Model(ModelArgs.from_dict(fake_config()))  # its weights are still lazy
    session = Session(model, TOKENIZER, memory)
    session.say(text(20))  # heard, but not yet run through the model
    for turn in range(3):
        if turn:
            script(session, text(10))
            session.tell(text(20))
        thread = threading.Thread(target=session.sleep)
        thread.start()
        thread.join()
        assert session.stats().sleeps == turn + 1 and session.pending == ()
    session.ask("hello")
