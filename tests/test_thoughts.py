"""Thoughts are shown apart and leave the window: its ids are those of the template, which drops
them from the past."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm import tokenizer_utils
from rich.console import Console

from mlx_sleep.chat_template import ChatTokenizer
from mlx_sleep.cli import output, settings
from mlx_sleep.cli.chat import _print_reply
from mlx_sleep.cli.sleeping import Interrupts
from mlx_sleep.lab.tasks.chat_source import ChatSource
from mlx_sleep.lab.tasks.world import Turn
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.session import Session
from mlx_sleep.sleep import passes_over
from mlx_sleep.thoughts import Marks, Thought, ThoughtReader
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_config
from tests.test_chat_template import CHATML, EACH, END, MARKS, make

NONE = "<think>\n\n</think>\n\n"
LAST = (  # the place of the last user's turn
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
OFF = "enable_thinking is defined and not enable_thinking"


def template(before_past: str, after_prompt: str) -> str:
    """ChatML. before_past is an expression of what stands before a reply of the past."""
    return (
        LAST
        + EACH
        + "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
        + "{{ '<|im_start|>' + m.role + '\n' }}"
        + "{% if m.role == 'assistant' %}{{ "
        + before_past
        + " }}{% endif %}{{ text + '<|im_end|>\n' }}"
        + END
        + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        + after_prompt
        + "{% endif %}"
    )


AFTER_LAST = f"'{NONE}' if loop.index0 > ns.last else ''".replace("\n", "\\n")
CLOSED = "{% if " + OFF + " %}{{ '" + NONE + "' }}{% endif %}"
OPENED = "{% if " + OFF + " %}{{ '" + NONE + "' }}{% else %}{{ '<think>\n' }}{% endif %}"
TEMPLATES = {
    # The model opens its thought itself, as Qwen3's does; the past has none.
    "opens": template(AFTER_LAST, CLOSED),
    # The prompt opens it, as Qwen3.5's does.
    "opened": template(AFTER_LAST, OPENED),
    # Each reply of the past has an empty one, which the prompt leaves to the model.
    "empty": template(f"'{NONE}'".replace("\n", "\\n"), CLOSED),
    # As "empty", but only when thinking is off, as SmolLM3's.
    "with the switch": template(f"'{NONE}' if {OFF} else ''".replace("\n", "\\n"), CLOSED),
}
SPECIAL = {"special": MARKS[:1], "eos": MARKS[1], "plain": ("<think>", "</think>")}


def chat_tokenizer(name: str, thinking="auto"):
    """(ours, transformers' own)"""
    _, theirs = make("bytes", TEMPLATES.get(name, name), **SPECIAL)
    return ChatTokenizer(tokenizer_utils.TokenizerWrapper(theirs), thinking), theirs


def model() -> Model:
    mx.random.seed(0)
    made = Model(ModelArgs.from_dict({**fake_config(window=200), "vocab_size": 800}))
    mx.eval(made.parameters())
    return made


def scripted(session: Session, theirs, reply: str) -> None:
    """The next reply is this text, whatever the model would say."""
    ids = theirs.encode(reply, add_special_tokens=False)
    end = session.tokenizer.convert_tokens_to_ids("<|im_end|>")
    script = iter([*ids, end, end, end])
    session.sampler = lambda logprobs: mx.array([next(script)])


def said(session: Session, theirs, text: str, reply: str) -> tuple[str, str]:
    """(thoughts, text) of a scripted reply."""
    scripted(session, theirs, reply)
    pieces = list(session.say(text))
    thoughts = "".join(piece for piece in pieces if isinstance(piece, Thought))
    return thoughts, "".join(piece for piece in pieces if not isinstance(piece, Thought))


def whole(theirs, texts, thinking: str) -> list[int]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    switch = {} if thinking == "auto" else {"enable_thinking": thinking == "on"}
    return theirs.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **switch
    )


def same_state(session: Session) -> bool:
    """Whether the working state is that of the pending tokens, read at once."""
    session._window.read()
    expected = session.model(mx.array([session.pending]))[0][0, -1]
    return bool(
        mx.allclose(session._window.working.logits, expected[: len(session.tokenizer)], atol=1e-4)
    )


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_window_is_the_whole_chat_without_thoughts(name, thinking):
    tokenizer, theirs = chat_tokenizer(name, thinking)
    session = Session(model(), tokenizer, max_tokens=20)
    opens = "" if name == "opened" else "<think>\n"
    replies = ["Fine, thanks.", "I see.\n\nReally."]
    texts = []
    for text, reply in zip(("Hello there", "and you? and you?"), replies, strict=True):
        thought = "" if thinking == "off" else f"{opens}well, let me see\n</think>\n\n"
        shown = said(session, theirs, text, thought + reply)
        assert shown[1] == reply and ("let me see" in shown[0]) is (thinking != "off")
        assert "think>" not in "".join(shown)
        texts += [text, thought + reply]
        following = [*texts, "ok?"]
        assert [*session.pending, *tokenizer.turn("ok?", first=False)] == whole(
            theirs, following, thinking
        )
        assert same_state(session)


def test_thinking_can_be_switched_between_turns():
    tokenizer, theirs = chat_tokenizer("opened")
    session = Session(model(), tokenizer)
    assert session.thinking == "auto"
    assert said(session, theirs, "hi", "well\n</think>\n\nYes") == ("well\n", "Yes")
    assert settings.change(session, "thinking off") == "thinking is off"
    assert said(session, theirs, "and?", "No") == ("", "No") and same_state(session)
    assert "thinking            off" in list(settings.values(session))
    texts = ["hi", "Yes", "and?", "No", "ok?"]
    following = [*session.pending, *session.tokenizer.turn("ok?", first=False)]
    assert following == whole(theirs, texts, "off")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_sleep_folds_in_no_thought(name):
    tokenizer, theirs = chat_tokenizer(name)
    session = Session(model(), tokenizer)
    said(session, theirs, "hi", ("" if name == "opened" else "<think>") + "a secret</think>\n\nYes")
    window = mx.array([session.pending])
    session.sleep()
    expected = passes_over(session.model, window, session.model.init_state(), session.passes)
    for layer, wanted in zip(session.snapshot, expected, strict=True):
        if "fast_weights" in layer:
            assert mx.allclose(layer["fast_weights"], wanted["fast_weights"], atol=1e-5)
    assert "secret" not in tokenizer.decode(window[0].tolist())


def test_kept_thoughts_are_folded_in():
    tokenizer, theirs = chat_tokenizer("opened")
    session = Session(model(), tokenizer, keep_thoughts=True)
    thought, text = said(session, theirs, "hi", "a secret\n</think>\n\nYes")
    assert (thought, text) == ("a secret\n", "Yes")
    assert "<think>\na secret\n</think>\n\nYes<|im_end|>" in tokenizer.decode(list(session.pending))
    assert same_state(session)


def test_a_reply_without_a_thought_is_read_once():
    tokenizer, theirs = chat_tokenizer("opens")
    session = Session(model(), tokenizer)
    said(session, theirs, "hi", "Yes.")
    assert session._window.working.read == len(session.pending) - len(tokenizer.end_ids)
    said(session, theirs, "and?", "<think>no</think>No.")
    assert session._window.working.read < len(session.pending) - len(tokenizer.end_ids)
    assert same_state(session)


def test_thoughts_don_t_count_as_a_reply_but_end_some_time():
    tokenizer, theirs = chat_tokenizer("opened")
    session = Session(model(), tokenizer, max_tokens=3, window=64)
    shown = said(session, theirs, "hi", "so many words " * 4 + "</think>\n\nYes. It is. Or not")
    assert shown[0].count("words") == 4 and shown[1].startswith("Y") and session.cut
    before = len(session.pending)
    shown = said(session, theirs, "hi", "never done " * 60)
    assert session.cut and not shown[1] and "never done never" in shown[0]
    assert session.ask("and now?") is not None  # the window is sound
    assert len(session.pending) < 64 + before


def test_a_window_that_fills_up_in_a_reply_sleeps_and_goes_on():
    tokenizer, theirs = chat_tokenizer("opened")
    session = Session(model(), tokenizer, max_tokens=100, window=32)
    reply = "one two three four five six seven eight nine ten eleven twelve"
    assert said(session, theirs, "count", "I count\n</think>\n\n" + reply)[1] == reply
    assert session.stats().sleeps >= 1 and same_state_after_sleep(session)


def same_state_after_sleep(session: Session) -> bool:
    session._window.read()
    tokens = mx.array([session.pending])
    expected = session.model(tokens, session.snapshot)[0][0, -1, : len(session.tokenizer)]
    return bool(mx.allclose(session._window.working.logits, expected, atol=1e-4))


def test_a_thought_that_is_cut_off_leaves_an_empty_reply():
    tokenizer, theirs = chat_tokenizer("opens")
    session = Session(model(), tokenizer)
    scripted(session, theirs, "<think>I wonder")
    pieces = session.say("hi")
    assert isinstance(next(pieces), Thought)
    pieces.close()
    turn = tokenizer.past_turn("hi", first=True)
    assert list(session.pending) == [*turn, *tokenizer.end_ids] and same_state(session)


# --- the switch ----------------------------------------------------------------------------------


def test_the_switch_is_the_templates():
    on, off = (chat_tokenizer("opened", thinking)[0] for thinking in ("on", "off"))
    assert on.decode(on.turn("hi", True)).endswith("<think>\n")
    assert off.decode(off.turn("hi", True)).endswith("</think>\n\n")
    granite = template("''", "{% if thinking %}{{ '<think>' }}{% endif %}")
    assert chat_tokenizer(granite, "on")[0].turn("hi", True)[-1] == on.convert_tokens_to_ids(
        "<think>"
    )


def test_a_template_without_a_switch():
    for thinking in ("on", "off"):
        with pytest.raises(UserError, match=f"no switch to turn thinking {thinking}"):
            chat_tokenizer(CHATML, thinking)
    plain, _ = make("bytes", CHATML, special=MARKS[:1], eos=MARKS[1])
    wrapped = plain._tokenizer
    assert ChatTokenizer(wrapped, "off").turn("hi", True) == plain.turn("hi", True)
    with pytest.raises(UserError, match="no switch"):
        ChatTokenizer(wrapped, "on")


# --- as it was in training ----------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_reads_what_the_training_read(name):
    """A life's tokens are those of a session, and so is what counts as a reply."""
    plain, theirs = chat_tokenizer(name)
    tokenizer = plain.to_train_with()
    assert (tokenizer.thinking, tokenizer.trained) == ("auto", "off")
    session = Session(model(), tokenizer, max_tokens=20)
    encoder = ChatSource(tokenizer, "train").lives().encoder
    life = encoder.opening()
    for text, reply in (("Hello there", "Fine, thanks."), ("and you?", "I see.")):
        assert said(session, theirs, text, reply) == ("", reply) and same_state(session)
        life.add(encoder.turn(Turn(text, reply, "chat", 1.0)))
    assert list(session.pending) == life.ids
    assert tokenizer.in_replies(life.ids) == life.reply
    assert tokenizer.decode(life.ids).count(NONE) == 2
    assert tokenizer.with_thinking("off").turn("ok?", True) == tokenizer.turn("ok?", True)
    on = tokenizer.with_thinking("on")
    assert on.turn("ok?", True) == whole(theirs, ["ok?"], "on")
    assert on.past_turn("ok?", True) == plain.with_thinking("on").past_turn("ok?", True)


def test_replies_in_a_window_of_which_a_part_was_thought_over():
    plain, _ = chat_tokenizer("opens")
    tokenizer = plain.to_train_with()
    thought_over, reply = plain.past_turn("hi", True), [*plain.encode_text("Yes"), plain.end_ids[0]]
    asked = [*plain.end_ids[1:], *tokenizer.turn("and?", False)]
    expected = [False] * len(thought_over) + [True] * len(reply) + [False] * len(asked)
    assert tokenizer.in_replies([*thought_over, *reply, *asked]) == expected


def test_a_template_without_a_switch_is_trained_with_as_it_is():
    plain, _ = chat_tokenizer(CHATML)
    tokenizer = plain.to_train_with()
    assert tokenizer.trained == "auto" and tokenizer.turn("hi", True) == plain.turn("hi", True)


# --- on the screen -------------------------------------------------------------------------------


class Says:
    """A session that has thought."""

    def say(self, text, should_stop=None, on_read=None):
        yield from (Thought("hm "), Thought("\x1b[2Jwell"), "Yes", ".")


def test_in_a_pipe_thoughts_are_not_in_the_output(capsys):
    _print_reply(Says(), "hi", Interrupts())
    assert capsys.readouterr() == ("Yes.\n", "")


def test_on_a_terminal_they_are_dim(monkeypatch, capsys):
    console = Console(force_terminal=True, stderr=True, highlight=False)
    monkeypatch.setattr(output, "stderr", lambda: console)
    _print_reply(Says(), "hi", Interrupts())
    out, error = capsys.readouterr()
    assert out == "Yes.\n" and error == "\x1b[2mhm \x1b[0m\x1b[2m[2Jwell\x1b[0m\n"


def test_the_option(refused):
    wrong = "--thinking takes on, off or auto, not 'maybe'"
    assert wrong in refused("generate", "--model", "embedded", "-p", "hi", "--thinking", "maybe")
    assert "no switch" in refused("generate", "--model", "embedded", "-p", "hi", "--thinking", "on")


# --- token by token ------------------------------------------------------------------------------


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def encode(text: str) -> list[int]:
    return list(map(ord, text))


@pytest.mark.parametrize(
    ("reply", "thinking", "thought", "text"),
    [
        ("Yes", False, "", "Yes"),
        ("[(a)]Yes", False, "a", "Yes"),
        ("\n[(a)]\n\nYes", False, "a", "Yes"),
        ("a)]\nYes", True, "a", "Yes"),
        ("a) ])]Yes", True, "a) ]", "Yes"),
        ("a))]Yes", True, "a)", "Yes"),
        ("a", True, "a", ""),
        ("a)", True, "a)", ""),
        ("a)]\n\n", True, "a", ""),
        ("[", False, "", "["),
        ("[x", False, "", "[x"),
        (" [x(b)]", False, "", " [x(b)]"),
        ("\n", False, "", "\n"),
        ("Yes [(b)]", False, "", "Yes [(b)]"),
        ("[()]  Yes", False, "", "  Yes"),
    ],
)
def test_marks_of_two_tokens(reply, thinking, thought, text):
    reader = ThoughtReader(Marks((91, 40), (41, 93)), thinking, decode, encode)
    splits = [*map(reader.add, encode(reply)), reader.finish()]
    found = [
        decode([i for split in splits for i in split.thought]),
        decode([i for split in splits for i in split.text]),
    ]
    assert found == [thought, text]


def test_a_line_break_in_the_first_token_of_the_text():
    words = {1: "<think>", 2: "</think>", 3: "\n\nYes", 4: " sir"}
    reader = ThoughtReader(
        Marks((1,), (2,)), False, lambda ids: "".join(words[i] for i in ids), encode
    )
    splits = [*map(reader.add, (1, 2, 3, 4)), reader.finish()]
    assert [i for split in splits for i in split.text] == [*encode("Yes"), 4]
