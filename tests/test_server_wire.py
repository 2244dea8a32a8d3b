"""OpenAI's requests and replies as data, and which turns of a client are known already."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.memory import Message
from mlx_sleep.server.conversation import Conversation, said
from mlx_sleep.server.wire import ApiError, Reply, StopStrings, Usage, read_request

HELLO = {"role": "user", "content": "hello"}


def request(**body):
    return read_request(json.dumps({"model": "m", "messages": [HELLO], **body}).encode())


def test_a_request_whole():
    got = request(
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "My cat "}] * 2},
            {"role": "assistant", "content": "I see."},
            {"role": "user", "content": "What cat?"},
        ],
        temperature=0.5,
        top_p=0.9,
        max_tokens=7,
        max_completion_tokens=5,
        seed=-1,
        stop="\n",
        stream=True,
        stream_options={"include_usage": True},
        user="anna",
        n=1,
        presence_penalty=0.0,
        metadata={"of": "no interest"},
    )
    assert got.system == "Be kind." and got.text == "What cat?"
    assert got.history == [("My cat My cat", "I see.")]
    assert got.sampling == {"temp": 0.5, "top_p": 0.9}
    assert (got.max_tokens, got.seed) == (5, 2**64 - 1)
    assert got.stop == ("\n",) and got.stream and got.include_usage and got.user == "anna"


def test_a_reply_that_never_came_is_empty():
    got = request(messages=[HELLO, {"role": "user", "content": "again"}])
    assert got.history == [("hello", "")] and got.text == "again"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": 3}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": " "}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}, HELLO]}, "messages[0]"),
        ({"messages": [HELLO, {"role": "assistant", "content": "x"}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": True}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"user": 5}, "user"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
    ],
)
def test_what_is_wrong_is_named(body, param):
    with pytest.raises(ApiError) as refused:
        request(**body)
    assert refused.value.status == 400 and refused.value.param == param
    assert refused.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object(raw):
    with pytest.raises(ApiError) as refused:
        read_request(raw)
    assert refused.value.status == 400 and "\n" not in refused.value.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "user", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
NAMES = "messages stop stream stream_options user seed max_tokens temperature top_p n tools".split()


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_body_is_a_request_or_an_error(body):
    try:
        got = request(**body)
    except ApiError as error:
        assert error.status == 400 and "\n" not in error.message
    else:
        assert got.text and all(isinstance(text, str) for pair in got.history for text in pair)


def test_replies_read_as_openai_s_own_types():
    chat = pytest.importorskip("openai.types.chat")
    reply, usage = Reply("m"), Usage(prompt=5, completion=2, cached=3)
    whole = chat.ChatCompletion.model_validate(reply.whole("hi", "stop", usage), strict=True)
    assert whole.choices[0].message.content == "hi" and whole.usage.total_tokens == 7
    assert whole.usage.prompt_tokens_details.cached_tokens == 3
    for raw in (reply.chunk({"content": "h"}), reply.chunk({}, "length"), reply.usage(usage)):
        assert raw.startswith(b"data: ") and raw.endswith(b"\n\n")
        chunk = chat.ChatCompletionChunk.model_validate(json.loads(raw[6:]), strict=True)
        assert chunk.id == whole.id
    assert chunk.usage.prompt_tokens == 5 and chunk.choices == []


def test_stop_strings_are_found_however_the_text_is_cut():
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=rng.randrange(12)))
        stops = tuple("".join(rng.choices("ab", k=rng.randrange(1, 4))) for _ in range(2))
        stop, got, at = StopStrings(stops), "", 0
        while at < len(text) and not stop.hit:
            length = rng.randrange(1, 4)
            got += stop.feed(text[at : at + length])
            at += length
        got += stop.rest()
        found = [text.find(s) for s in stops if s in text[:at]]
        assert stop.hit == bool(found) and got == text[: min(found, default=len(text))]


# --- conversations ---------------------------------------------------------------------------


def heard(*pairs: str) -> Conversation:
    """ "ab" is the user's a and the reply b."""
    return Conversation((p[0], p[1:]) for p in pairs)


def pairs(*pairs: str):
    return [(p[0], p[1:]) for p in pairs]


def test_what_was_heard_is_found():
    conversation = heard("ab", "cd", "ef")
    assert conversation.find(pairs("ab", "cd", "ef")) == (2, 3)
    assert conversation.find(pairs("cd", "ef")) == (2, 2)
    assert conversation.find(pairs("ab", "xx", "ef")) == (0, 1)
    assert conversation.find(pairs("xx", "cd")) == (None, 0)
    assert conversation.find([]) == (None, 0)


def test_two_conversations_that_take_turns():
    conversation = Conversation()
    first = conversation.add("a", "1", None)
    second = conversation.add("a", "2", None)
    first = conversation.add("b", "3", first)
    second = conversation.add("b", "4", second)
    assert conversation.find(pairs("a1", "b3")) == (first, 2)
    assert conversation.find(pairs("a2", "b4")) == (second, 2)
    assert conversation.find(pairs("a1", "b4")) == (0, 1)


def test_a_client_may_have_less_of_a_reply_that_was_cut():
    conversation = heard("along", "cd")
    assert conversation.find(pairs("alo", "cd")) == (1, 2)
    assert conversation.find(pairs("a", "cd")) == (1, 2)
    assert conversation.find(pairs("alonger", "cd")) == (None, 0)


def test_the_beginning_of_a_history():
    assert heard().is_beginning_of([])
    assert heard("ab").is_beginning_of(pairs("ab", "cd"))
    assert not heard("ab", "cd").is_beginning_of(pairs("ab"))
    assert not heard("ax").is_beginning_of(pairs("ab", "cd"))


def test_a_transcript_as_turns():
    roles = ["assistant", "user", "assistant", "user", "user", "assistant"]
    texts = ["?", "a", "b", "c", "d", None]
    messages = [Message(r, t, 0, "") for r, t in zip(roles, texts, strict=True)]
    assert said(messages) == [("a", "b"), ("c", ""), ("d", "")]


def test_a_system_text_before_the_first_turn_is_looked_past():
    assert Conversation([("Be kind.\n\nhello", "hi")]).find([("hello", "hi")]) == (0, 1)


def test_turns_that_an_edited_past_drops():
    conversation = Conversation()
    first = conversation.add("a", "1", None)
    second = conversation.add("b", "2", first)
    conversation.add("c", "3", second)
    assert [conversation.replaced(at) for at in (None, first, second, 2)] == [0, 2, 1, 0]
    conversation.take_back()
    assert conversation.find(pairs("a1", "b2", "c3")) == (second, 2)
    other = conversation.add("x", "4", None)
    assert [conversation.replaced(at) for at in (first, second, other)] == [0, 0, 0]
    assert heard("a1", "b2").replaced(0) == 0  # in a transcript it may be another's
