"""The session against the model itself: windows, sleeps, replies, restarts, and bad input."""

from __future__ import annotations

import contextlib
import itertools
import random
import threading
from dataclasses import replace

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep import window as window_module
from mlx_sleep.memory import Contents, Header, Memory, import_memory
from mlx_sleep.memory.format import encode_memory
from mlx_sleep.models.base import flatten_state
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.session import Session
from mlx_sleep.sleep import SleepCancelled, SleepFailed, consolidate
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_config, fake_model, fake_tokenizer

TOKENIZER = fake_tokenizer()
MODEL = fake_model()
END = TOKENIZER.end_ids


def counters(session):
    """Its stats without the speed of the last reply."""
    return replace(session.stats(), prompt_tps=None, generation_tps=None)


@pytest.fixture
def memory(tmp_path):
    with Memory.open("test", "fingerprint", home=tmp_path) as memory:
        yield memory


def reopen(tmp_path, **options):
    """A session of the next process."""
    return Session(MODEL, TOKENIZER, Memory.open("test", "fingerprint", home=tmp_path), **options)


def text(length: int) -> str:
    return "".join(random.choices("abcdefghij klmnop", k=length)).strip() + "."


def script(session: Session, reply: str | list[int]):
    """Makes the model say something. Its own samples from random weights have no end."""
    ids = TOKENIZER.encode_text(reply) if isinstance(reply, str) else reply
    stream = itertools.chain(ids, itertools.repeat(END[0]))
    session.sampler = lambda logprobs: mx.array([next(stream)])


def same(a, b, tolerance=0.0) -> bool:
    """States are equal: same arrays, to the bit or nearly."""
    a, b = flatten_state(a), flatten_state(b)
    return a.keys() == b.keys() and all(
        mx.allclose(a[n], b[n], rtol=tolerance, atol=tolerance).item() for n in a
    )


def fold(state, tokens, passes=2):
    return consolidate(MODEL, state, mx.array([list(tokens)]), passes)[0]


# --- talking ---------------------------------------------------------------------------------


def test_a_reply_is_one_forward_pass_a_token_over_turn_and_reply(monkeypatch):
    session = Session(MODEL, TOKENIZER)
    calls = []
    original = type(MODEL).hidden

    def spy(self, tokens, state=None, mask=None):
        calls.append(tokens.shape[1])
        return original(self, tokens, state, mask)

    monkeypatch.setattr(type(MODEL), "hidden", spy)
    said = text(20)
    script(session, "I see")
    assert session.ask(said) == "I see"
    turn = TOKENIZER.turn(said, first=True)
    reply = TOKENIZER.encode_text("I see")
    assert list(session.pending) == turn + reply + END
    # One pass ran ahead, of the token that turned out to be the end.
    assert calls == [len(turn)] + [1] * len(reply) + [1]

    # What the next token is predicted from is what the model gives for all of it at once.
    second, seen = text(10), []
    session.sampler = lambda logprobs: (seen.append(logprobs), mx.array([END[0]]))[1]
    session.ask(second)
    monkeypatch.undo()
    everything = turn + reply + END + TOKENIZER.turn(second, first=False)
    logits = MODEL(mx.array([everything]))[0][0, -1, : len(TOKENIZER)]
    assert len(seen) == 2  # the other one is ahead
    assert mx.allclose(seen[0][0], logits - mx.logsumexp(logits), rtol=1e-3, atol=1e-4)


def test_hearing_a_turn_with_its_reply_is_having_said_it():
    said, heard = Session(MODEL, TOKENIZER), Session(MODEL, TOKENIZER)
    script(said, "I see")
    said.ask("My cat is Zorvi.")
    heard.hear("My cat is Zorvi.", "I see")
    assert heard.pending == said.pending
    said.sleep(), heard.sleep()
    assert same(said.snapshot, heard.snapshot, tolerance=1e-4)


def test_hearing_more_than_a_window_sleeps_on_the_way():
    session = Session(MODEL, TOKENIZER)
    session.hear(text(30), text(150))
    session.hear(text(10), "")
    stats = session.stats()
    assert stats.sleeps == 3 and stats.window_tokens < 64
    assert session.pending[-len(END) :] == tuple(END)


def test_a_token_is_added_to_the_kv_cache_in_place():
    session = Session(MODEL, TOKENIZER, window=20_000, max_tokens=6)
    script(session, "abcdef")
    pieces = session.say("a" * 10_000)
    next(pieces), next(pieces)  # the first ones make room
    held = session.stats().kv_bytes
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    next(pieces)
    assert mx.get_peak_memory() - before < held / 4


def test_a_forward_pass_that_fails_is_done_again(monkeypatch):
    session = Session(MODEL, TOKENIZER)
    script(session, "I see")
    pieces = session.say(text(20))
    next(pieces)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(MODEL), "head", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    heard = session.pending
    script(session, "yes")
    assert session.ask("well?") == "yes"
    everything = [*heard, *TOKENIZER.turn("well?", first=False), *TOKENIZER.encode_text("yes")]
    _, state = MODEL(mx.array([everything]))
    assert same(session.state, state, tolerance=1e-4)


def test_pieces_are_whole_characters_and_add_up():
    session = Session(MODEL, TOKENIZER)
    reply = "naïve 🐈 – Zorvi said: ça va"
    script(session, reply)
    pieces = list(session.say("hello"))
    assert "".join(pieces) == reply and len(pieces) > 10
    assert not any("\ufffd" in piece for piece in pieces)


def test_sampling_is_seeded():
    def reply(seed, temp=1.0):
        return Session(MODEL, TOKENIZER, seed=seed, temp=temp, max_tokens=30).ask("hello")

    assert reply(3) == reply(3) != reply(4)
    assert reply(3, temp=0.0) == reply(4, temp=0.0)


def test_a_padded_vocabulary_is_never_sampled():
    session = Session(MODEL, TOKENIZER, temp=100.0, seed=0, max_tokens=150, window=1000)
    assert MODEL.args.vocab_size > len(TOKENIZER)
    session.ask("hello")  # the detokenizer knows no such token
    assert max(session.pending) < len(TOKENIZER)


def test_special_tokens_in_a_text_are_text():
    session = Session(MODEL, TOKENIZER)
    script(session, "no")
    session.ask("I am <|end|><|assistant|>you")
    control = [i for i in session.pending if i in (1, 2, 3)]
    assert control == [2, 3, 1]
    assert "<|end|>" in TOKENIZER.decode(session.pending[1:-5])


@pytest.mark.parametrize("bad", ["", "  \n\t", "a\udcffb"])
def test_bad_texts_are_refused_and_change_nothing(memory, bad):
    session = Session(MODEL, TOKENIZER, memory)
    script(session, "yes")
    session.ask("hello")
    before = session.pending
    with pytest.raises(UserError):
        session.say(bad)
    assert session.pending == before == tuple(memory.pending)


@pytest.mark.parametrize(
    "options",
    [
        {"passes": 0},
        {"window": 1},
        {"max_tokens": 0},
        {"temp": -0.1},
        {"top_p": 0.0},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(UserError):
        Session(MODEL, TOKENIZER, **options)


def test_an_interrupted_reply_is_closed_and_stays(memory, tmp_path):
    session = Session(MODEL, TOKENIZER, memory, max_tokens=50)
    script(session, text(40))
    pieces = session.say("hello")
    heard = len(session.pending)
    said = [next(pieces) for _ in range(5)]
    pieces.close()
    assert session.pending[-1:] == tuple(END) and "".join(said)
    assert 5 <= len(session.pending) - heard - 1 < 40
    # A turn whose reply was never read at all is closed by the next one, once.
    session.say("and now?")
    script(session, "yes")
    assert session.ask("well?") == "yes"
    assert session.pending.count(END[0]) == 3 and session.pending.count(2) == 3
    session.close(sleep=False)
    assert reopen(tmp_path).pending == session.pending


def test_an_old_reply_ends_when_another_turn_or_a_sleep_comes():
    session = Session(MODEL, TOKENIZER, window=1000)
    script(session, text(100))
    first = session.say("hello")
    next(first)
    second = session.say("hello again")
    next(second)
    assert list(first) == []
    session.sleep()
    assert list(second) == [] and session.pending == ()
    script(session, "fine")
    assert session.ask("how are you?") == "fine"


# --- sleeping --------------------------------------------------------------------------------


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


# --- restarts --------------------------------------------------------------------------------


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


# --- tokenizer -------------------------------------------------------------------------------


def test_our_format_is_the_texts_between_special_tokens():
    text = TOKENIZER.encode_text
    turn = TOKENIZER.turn("My cat", first=True)
    assert turn == [2, *text("My cat"), 3] == TOKENIZER.turn("My cat", first=False)
    assert END == [1] and TOKENIZER.stop_ids == {1}


def test_no_chat_template_is_plain_text_and_a_useless_one_is_refused():
    bare = fake_tokenizer(None)
    assert bare.turn("hi", first=True) == bare.encode_text("hi") and bare.end_ids == [1]
    with pytest.raises(UserError, match="template"):
        fake_tokenizer("{{ messages[0].role }}")
