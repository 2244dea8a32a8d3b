"""Decoding one token ahead: the state has seen what was taken, and no more."""

from __future__ import annotations

import threading

import mlx.core as mx
import pytest

from mlx_sleep.models.base import flatten_state
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from mlx_sleep.wake import READ, WorkingState
from tests.fakes import fake_model, fake_tokenizer

MODEL, TOKENIZER = fake_model(), fake_tokenizer()


def same(a, b) -> bool:
    a, b = flatten_state(a), flatten_state(b)
    return a.keys() == b.keys() and all(
        mx.allclose(a[name], b[name], rtol=1e-4, atol=1e-5).item() for name in a
    )


def after(tokens):
    return MODEL(mx.array([list(tokens)]))[1]


def greedy(logits):
    return mx.argmax(logits[None], axis=-1)


def test_a_token_that_is_not_taken_was_not_read():
    working = WorkingState(MODEL, len(TOKENIZER))
    working.feed([5, 6, 7])
    token = greedy(working.logits)
    working.run_ahead(token, greedy)
    assert same(working.state, after([5, 6, 7]))
    working.settle()
    working.feed([9])  # another one came in its place
    assert same(working.state, after([5, 6, 7, 9])) and working.read == 4


def test_tokens_that_are_taken_are_those_of_one_pass_after_the_other():
    working = WorkingState(MODEL, len(TOKENIZER))
    working.feed([5])
    tokens, token = [5], greedy(working.logits)
    for _ in range(6):
        following = working.run_ahead(token, greedy)
        tokens.append(token.item())
        working.take()
        expected = MODEL(mx.array([tokens]))[0][0, -1, : len(TOKENIZER)]
        assert mx.allclose(working.logits, expected, rtol=1e-3, atol=1e-4)
        token = following
    assert same(working.state, after(tokens)) and working.read == 7


def test_a_reply_that_is_left_can_be_gone_on_from_in_another_thread():
    session = Session(MODEL, TOKENIZER, window=400, max_tokens=100)
    pieces = session.say("hello")
    for _ in range(3):
        next(pieces)
    heard, failures = [], []

    def other():
        try:
            heard.append(session.ask("and then?"))
            session.sleep()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not failures and heard and session.stats().window_tokens == 0
    assert list(pieces) == []


def test_a_reply_stopped_early_leaves_the_state_of_its_tokens():
    session = Session(MODEL, TOKENIZER, window=400, max_tokens=100)
    pieces = session.say("hello")
    next(pieces)
    pieces.close()
    seen = session.pending[: -len(TOKENIZER.end_ids)]
    read = session._window.working.read
    assert len(seen) - 1 <= read <= len(seen) and same(session.state, after(seen[:read]))


def test_a_window_that_fills_within_a_reply_sleeps_and_the_reply_goes_on():
    session = Session(MODEL, TOKENIZER, window=30, passes=1, max_tokens=60)
    TOKENIZER_STOPS, session.tokenizer.stop_ids = session.tokenizer.stop_ids, frozenset()
    try:
        session.ask("hello")
    finally:
        session.tokenizer.stop_ids = TOKENIZER_STOPS
    stats = session.stats()
    said = stats.tokens + stats.window_tokens
    assert stats.sleeps == 2 and said == len(TOKENIZER.turn("hello", first=True)) + 61
    assert session.cut


def test_a_long_turn_is_read_in_parts_and_can_be_stopped_between_them():
    session = Session(MODEL, TOKENIZER, window=4 * READ, max_tokens=1)
    seen = []
    list(session.say("a" * 2 * READ, on_read=lambda done, total: seen.append((done, total))))
    turn = len(TOKENIZER.turn("a" * 2 * READ, first=True))
    assert seen == [(done, turn) for done in (0, READ, 2 * READ)]

    def stop(done, total):
        if done:
            raise KeyboardInterrupt

    session.forget()
    with pytest.raises(KeyboardInterrupt):
        list(session.say("a" * 2 * READ, on_read=stop))
    assert session._window.working.read == READ
    assert list(session.pending) == TOKENIZER.turn("a" * 2 * READ, True) + TOKENIZER.end_ids


def test_cut_says_whether_a_reply_ended_at_max_tokens():
    session = Session(MODEL, TOKENIZER, max_tokens=3)
    session.sampler = lambda logprobs: mx.array([10])
    session.ask("hello")
    assert session.cut
    session.sampler = lambda logprobs: mx.array([TOKENIZER.end_ids[0]])
    session.ask("hello")
    assert not session.cut


def test_a_wrong_setting_is_one_line():
    for wrong in ({"top_k": -1}, {"min_p": 1.5}, {"repetition_penalty": 0.0}):
        with pytest.raises(UserError, match="must be"):
            Session(MODEL, TOKENIZER, **wrong)
