"""The server over sockets: OpenAI's API, memories, who may ask, and clients that leave."""

from __future__ import annotations

import json
import threading

import httpx
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from mlx_sleep.memory import Memory, show_memory
from mlx_sleep.server import engine as engine_module
from mlx_sleep.server import guard, jobs, run
from mlx_sleep.server.app import memory_of_user
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import TEMPLATE, fake_tokenizer
from tests.servers import MODEL, TOKENIZER, Server, text_of, until


@pytest.fixture
def serve(tmp_path, monkeypatch):
    servers = []

    def serve(**options):
        server = Server(tmp_path, monkeypatch, **options)
        servers.append(server.__enter__())
        return server

    yield serve
    for server in servers:
        server.stop()


def pending(memory, home):
    """What a memory holds on the disk, as text."""
    with Memory.open(memory, "fingerprint", home=home) as opened:
        return TOKENIZER.decode(opened.pending)


# --- completions -----------------------------------------------------------------------------


def test_the_openai_client(serve):
    openai = pytest.importorskip("openai")
    server = serve()
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="unused", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "mlx-sleep"
    messages = [{"role": "user", "content": "My cat is Zorvi."}]
    whole = client.chat.completions.create(model="tiny", messages=messages, user="anna")
    assert whole.choices[0].message.content == "I see" and whole.choices[0].finish_reason == "stop"
    assert whole.usage.completion_tokens == len(TOKENIZER.encode_text("I see"))
    assert whole.usage.prompt_tokens == len(TOKENIZER.turn("My cat is Zorvi.", first=True))

    messages += [{"role": "assistant", "content": "I see"}, {"role": "user", "content": "ok"}]
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=messages,
            user="anna",
            stream=True,
            stream_options={"include_usage": True},
            max_completion_tokens=3,
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "I " and chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 10
    with pytest.raises(openai.NotFoundError, match="ask for 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=messages)
    with pytest.raises(openai.BadRequestError, match="tools"):
        tools = [{"type": "function", "function": {"name": "f"}}]
        client.chat.completions.create(model="tiny", messages=messages, tools=tools)


def test_a_stream_is_whole_events(serve):
    with serve().stream("hello") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    deltas = [body["choices"][0]["delta"] for body in bodies]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == "I see"


def test_stop_strings_end_a_reply(serve, tmp_path):
    server = serve()
    server.reply = "one, two, three"
    body = server.post("count", memory="m", stop=["wo,", ", three"]).json()
    assert body["choices"][0] | {"message": ""} == {
        "index": 0,
        "message": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert body["choices"][0]["message"]["content"] == "one, t"
    # The history has the reply as the client got it; nothing is read twice.
    server.post("count", "one, t", "again", memory="m")
    server.stop()
    assert pending("m", tmp_path).count("count") == 1


def test_a_seed_gives_the_same_reply_whatever_runs_beside_it(serve):
    server = serve()
    server.reply = None
    options = {"temperature": 1.0, "max_tokens": 20, "seed": 7}
    alone = text_of(server.post("hello", **options))
    others = [
        threading.Thread(target=server.post, args=("other",), kwargs={**options, "seed": seed})
        for seed in (None, 7, 8)
    ]
    for other in others:
        other.start()
    assert text_of(server.post("hello", **options)) == alone
    assert text_of(server.post("hello", **{**options, "seed": 8})) != alone
    for other in others:
        other.join()


@pytest.mark.parametrize(
    ("raw", "status"), [(b"no JSON", 400), (b"[]", 400), (b" " * 5_000_000, 413)]
)
def test_bodies_that_are_none(serve, raw, status):
    response = httpx.post(serve().url + "/v1/chat/completions", content=raw)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_wrong_paths_and_methods(serve):
    server = serve()
    assert server.get("/v1/nothing").status_code == 404
    wrong = server.get("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"]
    assert server.get("/v1/models/other").status_code == 404
    assert server.get("/health").json() == {"status": "ok"}


# --- memories and histories ------------------------------------------------------------------


def test_only_new_turns_are_read(serve, tmp_path):
    server = serve()
    server.post("My cat is Zorvi.", memory="anna")
    usage = server.post("My cat is Zorvi.", "I see", "ok", memory="anna").json()["usage"]
    turn = TOKENIZER.turn("ok", first=False)
    read = usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]
    assert read == len(turn)
    server.post("by the way", memory="anna")  # a new conversation on the same memory
    server.post("My cat is Zorvi.", "I see", "ok", "I see", "well", memory="anna")
    server.stop()
    said = pending("anna", tmp_path)
    assert [said.count(text) for text in ("Zorvi", "ok", "by the way", "well")] == [1] * 4


def test_a_past_that_was_never_heard_is_read_as_given(serve, tmp_path):
    server = serve()
    server.post("My cat is Zorvi.", "Nice name", "ok", memory="anna")
    server.stop()
    said = pending("anna", tmp_path)
    assert said.index("Zorvi") < said.index("Nice name") < said.index("ok") < said.index("I see")


def test_an_edited_past_takes_back_what_it_drops(serve, tmp_path):
    server = serve()
    said = ["My cat is Zorvi.", "I see", "It is black.", "I see", "well"]
    for length in (1, 3, 5):
        server.post(*said[:length], memory="anna")
    httpx.post(server.url + "/v1/memories/anna/sleep")
    server.post(*said[:2], "It is white.", memory="anna")
    assert len(server.get("/v1/memories/anna/transcript").json()["turns"]) == 2
    server.post("by the way", memory="anna")
    server.post(*said[:2], "It is red.", memory="anna")  # the others are not this conversation's
    server.stop()
    text = pending("anna", tmp_path)
    counts = [text.count(word) for word in ("Zorvi", "black", "well", "white", "way", "red")]
    assert counts == [1, 0, 0, 1, 1, 1]


def test_a_transcript_outlives_the_server(serve, tmp_path):
    server = serve()
    server.post("My cat is Zorvi.", memory="anna")
    server.stop()
    server = serve()
    turns = [{"user": "My cat is Zorvi.", "reply": "I see"}]
    assert server.get("/v1/memories/anna/transcript").json()["turns"] == turns
    assert server.get("/v1/memories/anna").json()["open"] is False
    assert server.get("/v1/memories/ben/transcript").json()["turns"] == []
    server.post("My cat is Zorvi.", "I see", "well", memory="anna")
    server.stop()
    assert pending("anna", tmp_path).count("Zorvi") == 1


def test_a_user_without_a_memory_leaves_nothing(serve, tmp_path):
    server = serve()
    assert text_of(server.post("My cat is Zorvi.")) == "I see"
    assert server.get("/v1/memories").json()["data"] == []
    assert not (tmp_path / "memories").exists()


def test_a_guest_s_state_is_that_of_its_own_history(serve):
    server = serve()

    def usage(*said):
        usage = server.post(*said).json()["usage"]
        return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]

    total, cached = usage("one")
    assert cached == 0
    assert usage("one", "I see", "two")[1] == total + len(TOKENIZER.encode_text("I see")) + 1
    assert usage("two")[1] == 0  # another guest
    edited = ("one", "I saw", "two")
    assert usage(*edited)[1] == 0
    guests = [slot.session.pending for slot in server.sessions.slots]
    heard = [TOKENIZER.decode(list(ids)) for ids in guests]
    assert sum("I saw" in text for text in heard) == 1


def test_a_guest_s_system_text_comes_first(serve):
    server = serve()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hello"}]
    server.post(messages=messages)
    [slot] = server.sessions.slots
    heard = TOKENIZER.decode(list(slot.session.pending))
    assert heard.index("Be kind.") < heard.index("hello")
    server.post("hello")
    assert len(server.sessions.slots) == 2


def test_a_system_text_is_the_system_prompt_where_the_template_has_one():
    roles = (
        "{{ {'system': '<|user|>!', 'user': '<|user|>', 'assistant': '<|assistant|>'}[m.role] }}"
    )
    rest = TEMPLATE[TEMPLATE.index("{{ m.content }}") :]
    session = Session(MODEL, fake_tokenizer("{% for m in messages %}" + roles + rest))
    assert jobs._take_system(session, "Be kind.") == "" and session.system_prompt == "Be kind."
    assert jobs._take_system(session, "") == "" and session.system_prompt == "Be kind."
    with pytest.raises(UserError, match="window"):
        jobs._take_system(session, "Be kind. " * 50)
    none = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    session = Session(MODEL, fake_tokenizer(none))
    assert jobs._take_system(session, "Be kind.") == "Be kind." and not session.system_prompt


def test_a_history_longer_than_the_window_sleeps_on_the_way(serve):
    server = serve()
    said = [f"turn {i} " + "x" * 40 for i in range(11)]
    assert text_of(server.post(*said)) == "I see"
    [slot] = server.sessions.slots
    assert slot.session.stats().sleeps >= 2


def test_names_of_users():
    assert memory_of_user("anna") == "anna"
    mail = memory_of_user("anna@example.com")
    assert mail.startswith("anna-example-com-") and memory_of_user("anna@example.org") != mail
    assert memory_of_user("\n") != memory_of_user("\t")


def test_the_least_used_memory_is_put_away_and_comes_back(serve, tmp_path):
    server = serve(limit=4)
    for i in range(6):
        server.post(f"I am number {i}.", memory=f"user{i}")
    assert {slot.name for slot in server.sessions.slots} == {f"user{i}" for i in range(2, 6)}
    with Memory.open("user0", "fingerprint", home=tmp_path):  # another program may use it
        busy = server.post("hello", memory="user0")
        assert busy.status_code == 409 and "in use" in busy.json()["error"]["message"]
    server.post("hello", memory="user0")
    heard = TOKENIZER.decode(list(server.sessions.named("user0").session.pending))
    assert "number 0" in heard and "hello" in heard


def test_what_nobody_uses_is_put_away(serve, tmp_path, monkeypatch):
    monkeypatch.setattr(engine_module, "UNUSED", 0.2)
    server = serve(idle=0.1)
    server.post("My cat is Zorvi.", memory="anna")
    server.post("hello")
    until(lambda: not server.sessions.slots)
    assert server.get("/v1/memories/anna").json()["open"] is False
    memory = Memory.open("anna", "fingerprint", home=tmp_path)  # a chat may have it now
    assert memory.header.sleeps == 1
    memory.close()
    assert text_of(server.post("well", memory="anna")) == "I see"


def test_a_name_that_cannot_be_a_memory_s(serve):
    response = serve().post("hello", memory="../etc")
    assert response.status_code == 400 and "cannot name a memory" in response.text


# --- sleep -----------------------------------------------------------------------------------


def test_it_sleeps_when_nobody_asks(serve):
    server = serve(idle=0.05)
    server.post("My cat is Zorvi.", memory="anna")
    state = until(lambda: (s := server.get("/v1/memories/anna").json())["sleeps"] and s)
    assert state["window_tokens"] == 0 and state["tokens"] > 10 and state["sleeping"] is None
    server.post("hello")  # a guest's window is left alone
    assert text_of(server.post("well", memory="anna")) == "I see"


def test_a_sleep_makes_no_memory(serve):
    server = serve()
    answer = httpx.post(server.url + "/v1/memories/nobody/sleep")
    assert answer.status_code == 404 and "no memory 'nobody'" in answer.json()["error"]["message"]
    assert server.get("/v1/memories").json()["data"] == []


def test_it_does_not_sleep_when_it_may_not(serve):
    server = serve(idle=0.02, may_sleep=lambda: "on battery")
    server.post("My cat is Zorvi.", memory="anna")
    state = until(lambda: (s := server.get("/v1/memories/anna").json())["waits"] and s)
    assert state["waits"] == "on battery" and state["sleeps"] == 0


def test_a_request_cancels_a_sleep(serve, monkeypatch):
    server = serve(idle=0.02)
    asleep, go_on = threading.Event(), threading.Event()
    original = engine_module.sleep

    def sleep(slot, should_stop):
        def stop():
            asleep.set()
            go_on.wait(10)
            return should_stop()

        return original(slot, stop)

    monkeypatch.setattr(engine_module, "sleep", sleep)
    server.post("My cat is Zorvi.", memory="anna")
    assert asleep.wait(10)
    assert server.get("/v1/memories/anna").json()["sleeping"]["passes"] == 2
    asked = threading.Thread(target=server.post, args=("hello",))
    asked.start()
    until(lambda: server.engine.queued)
    go_on.set()
    asked.join()
    assert len(server.sessions.slots) == 2
    until(lambda: server.get("/v1/memories/anna").json()["sleeps"] == 1)


def test_sleep_on_demand(serve):
    server = serve()
    server.post("My cat is Zorvi.", memory="anna")
    slept = httpx.post(server.url + "/v1/memories/anna/sleep").json()["slept"]
    assert slept["passes"] == 2 and slept["tokens"] > 10
    assert httpx.post(server.url + "/v1/memories/anna/sleep").json() == {"slept": None}


# --- many clients, and clients that leave ----------------------------------------------------


def test_replies_take_turns(serve):
    server = serve()
    server.pause = 0.01
    server.reply = lambda request: "x" * 60 if request.text == "long" else "short"
    with server.stream("long") as long:
        lines = long.iter_lines()
        next(lines)
        assert text_of(server.post("quick")) == "short"
        left = sum(1 for line in lines if '"content": "x' in line)
    assert left > 20  # the long one was not done when the short one was


def test_too_many_requests(serve, monkeypatch):
    monkeypatch.setattr(engine_module, "QUEUED", 3)
    monkeypatch.setattr(engine_module, "QUEUED_A_MEMORY", 1)
    server = serve()
    server.gate.clear()
    answers = []

    def ask(memory):
        answers.append(server.post("hello", memory=memory).status_code)

    def ask_beside(memory):
        thread = threading.Thread(target=ask, args=(memory,))
        thread.start()
        return thread

    threads = []
    for waiting, name in enumerate(("anna", "anna", "ben", "cara")):  # the first one is said
        threads.append(ask_beside(name))
        until(lambda: server.engine.queued == waiting + 1)  # noqa: B023
    ask("dora")
    assert answers == [503]
    monkeypatch.setattr(engine_module, "QUEUED", 10)
    ask("anna")
    assert answers == [503, 429]
    server.gate.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200, 200, 200, 200, 429, 503]


def test_a_client_that_leaves_ends_its_reply_and_loses_nothing(serve, tmp_path):
    server = serve()
    server.pause, server.reply = 0.02, "abcdefghij" * 6
    with server.stream("My cat is Zorvi.", memory="anna") as response:
        lines = response.iter_lines()
        got = ""
        while len(got) < 4:
            line = next(lines)
            if line.startswith("data: "):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                got += delta.get("content") or ""
    until(lambda: server.engine.queued == 0)
    [turn] = server.sessions.named("anna").conversation.turns
    assert turn.reply.startswith(got) and len(turn.reply) < 55
    server.pause = 0
    text_of(server.post("My cat is Zorvi.", got, "go on", memory="anna"))
    server.stop()
    said = pending("anna", tmp_path)
    assert said.count("Zorvi") == 1 and got in said and "go on" in said


def test_a_client_that_leaves_before_its_turn_comes(serve):
    server = serve()
    server.pause, server.reply = 0.02, "x" * 30
    with server.stream("first", memory="anna"):
        with pytest.raises(httpx.ReadTimeout):
            request = server._request(("second",), "anna", None, {})
            httpx.post(**request, timeout=0.2)
    until(lambda: server.engine.queued == 0)
    said = [turn.user for turn in server.sessions.named("anna").conversation.turns]
    assert said == ["first"]


def test_a_stop_cuts_replies_and_keeps_them(serve, tmp_path):
    server = serve()
    server.pause, server.reply = 0.1, "abcdefghij" * 6
    seen = []

    def ask():
        with server.stream("My cat is Zorvi.", memory="anna") as response:
            seen.extend(response.iter_lines())

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: server.sessions.slots and len(server.sessions.slots[0].session.pending) > 22)
    server.stop()
    asking.join()
    assert "the server is stopping" in seen[-2]
    said = pending("anna", tmp_path)
    assert "Zorvi" in said and "abc" in said and said.count("abcdefghij") < 6


def test_a_fault_ends_one_reply_only(serve, capsys):
    server = serve()
    server.reply = lambda request: 1 / 0 if request.text == "fail" else "I see"
    response = server.post("fail")
    assert response.status_code == 500 and "division" not in response.text
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert text_of(server.post("hello")) == "I see"


# --- who may ask -----------------------------------------------------------------------------


def test_names_that_are_not_this_machine_s_are_refused(serve):
    server = serve()
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", ""):
        refused = server.get("/v1/models", headers={"Host": host})
        assert refused.status_code in (400, 403)
    for host in ("localhost", "127.0.0.1:1", "[::1]:8080"):
        assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_other_pages_are_refused(serve):
    server = serve(origins=["https://app.example"])
    other = server.post("hello", memory="anna", headers={"Origin": "https://evil.example"})
    assert other.status_code == 403 and "--allow-origin" in other.text
    assert server.post("hello", headers={"Origin": "null"}).status_code == 403
    assert server.post("hello", headers={"Origin": server.url}).status_code == 200
    allowed = server.post("hello", headers={"Origin": "https://app.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert server.sessions.named("anna") is None


def test_a_key(serve):
    server = serve(key="sesame")
    for headers in ({}, {"Authorization": "sesame"}, {"Authorization": "Bearer wrong"}):
        refused = server.post("hello", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert server.get("/v1/memories", headers=headers).status_code == 401
    assert server.post("hello", headers={"Authorization": "Bearer sesame"}).status_code == 200
    assert server.get("/health").status_code == 200 and server.get("/").status_code == 200


def test_addresses():
    assert all(map(guard.is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(guard.is_loopback, ("", "0.0.0.0", "::", "192.168.1.2", "localhost.evil")))
    run.check_key("127.0.0.1", None)
    run.check_key("0.0.0.0", "sesame")
    for host, key in (("0.0.0.0", None), ("127.0.0.1", " "), ("::", None)):
        with pytest.raises(UserError, match="key"):
            run.check_key(host, key)


def test_a_port_that_is_taken():
    with run.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} is taken.*--port"):
            run.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="check --host"):
        run.listen("no.such.host.invalid", 0)


def test_the_memory_is_as_a_chat_leaves_it(serve, tmp_path):
    server = serve()
    server.post("My cat is Zorvi.", memory="anna")
    server.stop()
    listing = show_memory("anna", tmp_path)
    assert listing.problem is None and listing.header.model == "tiny" and listing.pending > 20
