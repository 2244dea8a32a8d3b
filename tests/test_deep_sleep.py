"""Deep sleep: what is asked, when a memory is rebuilt, and that it is a transaction."""

from __future__ import annotations

import threading

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep import deep_sleep as deep
from mlx_sleep.cli.terminal import IdleSleeper
from mlx_sleep.memory import Memory, Message
from mlx_sleep.models.base import flatten_state
from mlx_sleep.session import Session
from mlx_sleep.sleep import SleepCancelled
from tests.fakes import fake_model, fake_tokenizer

MODEL, TOKENIZER = fake_model(), fake_tokenizer()
SAID = [
    ("My cat is called Mia.", "Nice."),
    ("I live in Lisbon.", "Noted."),
    ("What is my cat called?", "It is called Mia."),
    ("And my dog?", "You have not told me."),
    ("My dog is Rex.", "Good."),
    ("Where do I live?", "In Lisbon, near Rex."),
]


def pairs():
    return [
        (Message("user", text, i, ""), Message("assistant", reply, i, ""))
        for i, (text, reply) in enumerate(SAID)
    ]


@pytest.fixture
def session(tmp_path):
    memory = Memory.open("ada", "fingerprint", home=tmp_path)
    with Session(MODEL, TOKENIZER, memory, window=60) as session:
        for text, reply in SAID:
            session.hear(text, reply)
        session.sleep()
        yield session


def test_probes_are_replies_out_of_what_was_told_before():
    found = deep.probes(pairs())
    assert [number for number, _ in found] == [2, 5]
    mia, lisbon = (probe for _, probe in found)
    assert mia == deep.Probe(*SAID[2], SAID[0])
    assert lisbon.told == SAID[4]  # the last turn that told any of it
    assert deep.probes([]) == []


def test_the_loss_is_that_of_the_reply_given_the_fast_weights(session):
    probe = deep.Probe(*SAID[2], SAID[0])
    for told in (False, True):
        before = TOKENIZER.turn(SAID[0][0], first=False) + TOKENIZER.encode_text(SAID[0][1])
        ids = before + TOKENIZER.end_ids if told else []
        ids = ids + TOKENIZER.turn(SAID[2][0], first=False)
        reply = TOKENIZER.encode_text(SAID[2][1])
        logits = MODEL(mx.array([ids + reply]), session.snapshot)[0][0].astype(mx.float32)
        logits = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        want = -sum(logits[len(ids) - 1 + i, token] for i, token in enumerate(reply))
        got = deep._loss(session, session.snapshot, [probe], told, None)
        assert got == pytest.approx(want, rel=1e-4)


def held(session):
    memory = session.memory
    state = {name: np.array(x).tobytes() for name, x in flatten_state(session.snapshot).items()}
    return state, memory.header.sleeps, list(memory.messages), session.pending


def losses(monkeypatch, *values):
    given = iter(values)
    monkeypatch.setattr(deep, "_loss", lambda *_: next(given))


def test_a_faded_memory_is_rebuilt_from_what_was_told(session, monkeypatch):
    losses(monkeypatch, 5.0, 1.0, 2.0)
    report = deep.deep_sleep(session)
    assert report == deep.DeepSleepReport(5.0, 1.0, 2.0, 2, 4, True)
    want = Session(MODEL, TOKENIZER, window=60)
    for number in (0, 1, 3, 4):
        want.hear(*SAID[number])
    want.sleep()
    state = flatten_state(want.snapshot)
    for name, array in flatten_state(session.snapshot).items():
        assert mx.array_equal(array, state[name]), name
    assert [m.text for m in session.memory.messages[::2]] == [text for text, _ in SAID]
    assert not session.pending and session.stats().tokens == want.stats().tokens
    assert deep.turns(session.memory.messages, session.stats().tokens, "ada")  # it can be again


@pytest.mark.parametrize("values, read", [((5.0, 4.5), 0), ((5.0, 1.0, 5.5), 4)])
def test_what_has_not_faded_or_got_no_better_stays(session, monkeypatch, values, read):
    before = held(session)
    losses(monkeypatch, *values)
    report = deep.deep_sleep(session)
    assert (report.read, report.kept) == (read, False)
    assert held(session) == before


def test_nothing_to_ask(tmp_path):
    assert deep.deep_sleep(Session(MODEL, TOKENIZER)) is None
    memory = Memory.open("ada", "fingerprint", home=tmp_path)
    with Session(MODEL, TOKENIZER, memory, transcript=False) as session:
        session.hear(*SAID[0])
        session.hear(*SAID[2])
        assert deep.deep_sleep(session) is None  # the window is not empty
        session.sleep()
        assert deep.deep_sleep(session) is None


def test_cancelled_at_any_time_nothing_has_changed(session, monkeypatch):
    monkeypatch.setattr(deep, "FADED", -1e9)
    before, asked = held(session), []
    for after in range(0, 100, 9):
        asked.clear()

        def should_stop(after=after):
            asked.append(1)
            return len(asked) > after

        try:
            deep.deep_sleep(session, should_stop)
        except SleepCancelled:
            assert held(session) == before
        else:
            assert after
            break


def test_it_comes_after_a_long_idle_time(session, monkeypatch):
    notes, done = [], threading.Event()

    def note(text):
        notes.append(text)
        done.set()

    losses(monkeypatch, 5.0, 1.0, 2.0)
    sleeper = IdleSleeper(session, 0.01, lambda text: None, note, deep=0.02)
    sleeper.start()
    assert done.wait(20)
    sleeper.stop()
    assert notes == ["deep sleep: 4 turns read again; a reply costs 2.0 nats, 5.0 before"]


def test_a_key_puts_it_off(session, monkeypatch):
    monkeypatch.setattr(deep, "deep_sleep", lambda *_: pytest.fail("not now"))
    sleeper = IdleSleeper(session, 0.01, lambda text: None, lambda text: None, deep=30)
    sleeper.start()
    sleeper.key_pressed()
    sleeper.stop()
