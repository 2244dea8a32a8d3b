"""A server in this process, over a tiny random model whose replies are given."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time

import httpx
import mlx.core as mx

from mlx_sleep.server import app, engine, jobs, run, sessions
from mlx_sleep.session import Session
from tests.fakes import fake_model, fake_tokenizer

TOKENIZER = fake_tokenizer()
MODEL = fake_model(window=200)


class Server:
    """url, engine, and `reply`: what the model says from now on, or a function of the request;
    None is its own words.
    `pause` seconds pass before each token, and none is said while `gate` is closed."""

    def __init__(self, home, monkeypatch, *, key=None, origins=(), host="127.0.0.1", **options):
        self.reply, self.pause = "I see", 0.0
        self.gate = threading.Event()
        self.gate.set()
        self._limit = options.pop("limit", 8)
        set_up = jobs._set_up

        def scripted(session, request, like):
            set_up(session, request, like)
            if self.reply is not None:
                session.sampler = self._sampler(request)

        monkeypatch.setattr(jobs, "_set_up", scripted)
        like = Session(MODEL, TOKENIZER, max_tokens=64)
        kept = sessions.Sessions(like, "fingerprint", "tiny", home=home, limit=self._limit)
        self.engine = engine.Engine(kept, **{"idle": 0, **options})
        self.sessions = kept
        served = app.make_app(self.engine, host=host, key=key, origins=origins)
        listener = run.listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.uvicorn = run.Server(served, self.engine, finish=0.5)
        self._thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [listener]})
        self._listener = listener

    def _sampler(self, request):
        text = self.reply(request) if callable(self.reply) else self.reply
        ids = itertools.chain(TOKENIZER.encode_text(text), itertools.repeat(TOKENIZER.end_ids[0]))

        def sample(logprobs):
            self.gate.wait()
            time.sleep(self.pause)
            return mx.array([next(ids)])

        return sample

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        self.gate.set()
        self.uvicorn.should_exit = True
        self._thread.join()
        self._listener.close()

    def get(self, path, **more):
        return httpx.get(self.url + path, **more)

    def post(self, *said, memory=None, headers=None, **body):
        """Asks for a completion. said: user, reply, user, ... in turn."""
        return httpx.post(**self._request(said, memory, headers, body), timeout=60)

    @contextlib.contextmanager
    def stream(self, *said, memory=None, headers=None, **body):
        request = self._request(said, memory, headers, {"stream": True, **body})
        with httpx.stream("POST", **request, timeout=60) as response:
            yield response

    def _request(self, said, memory, headers, body):
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)
        ]
        headers = {**(headers or {}), **({"X-Memory": memory} if memory else {})}
        return {
            "url": self.url + "/v1/chat/completions",
            "json": {"model": "tiny", "messages": messages, **body},
            "headers": headers,
        }


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def until(condition, seconds=20.0):
    """Waits for a condition to be true, and gives its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)
    return value
