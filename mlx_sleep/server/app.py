"""The routes: OpenAI's, the memories', and the page."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import asdict
from importlib import resources

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..memory import list_memories
from ..memory.location import NAME, Location
from ..utils.errors import UserError
from .conversation import Pair, said
from .engine import Engine
from .guard import Guard
from .jobs import ChatJob, Done, Event, Failed, Job, Piece, SleepJob, Slept
from .sessions import Slot
from .wire import ApiError, ChatRequest, Reply, event, read_request

LARGEST_BODY = 4_000_000
"""Bytes. A conversation longer than that would be read for minutes."""

MEMORY_HEADER = "X-Memory"


def make_app(
    engine: Engine, *, host: str, key: str | None = None, origins: Iterable[str] = ()
) -> Starlette:
    """The ASGI application. Its lifespan is the engine's.

    host is the address that it is served on; key the API key, None for none; origins those of
    other web pages that may ask.
    """
    allowed = frozenset(origins)
    api = _Api(engine)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await run_in_threadpool(engine.stop)

    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/v1/chat/completions", api.chat, methods=["POST"]),
        Route("/v1/models", api.models),
        Route("/v1/models/{model:path}", api.model),
        Route("/v1/memories", api.memories),
        Route("/v1/memories/{name}", api.memory),
        Route("/v1/memories/{name}/sleep", api.sleep, methods=["POST"]),
        Route("/v1/memories/{name}/transcript", api.transcript),
    ]
    middleware = [Middleware(Guard, host, key, allowed)]
    if allowed:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(allowed), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _fault}
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers=handlers,  # type: ignore[arg-type]  # each takes its own exception
        lifespan=lifespan,
    )


class _Api:
    def __init__(self, engine: Engine):
        self._engine, self._sessions = engine, engine.sessions
        self._started = int(time.time())
        self._page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
        self._policy = _policy(self._page)

    # --- OpenAI's ----------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        asked = read_request(await _body(request))
        if asked.model != self._sessions.model:
            raise self._no_model(asked.model)
        memory = _memory_of(request, asked)
        events = _Events(request)
        job = ChatJob(asked, memory, events.put)
        reply = Reply(asked.model)
        self._engine.submit(job)
        events.job = job
        with events.cancelling() as streamed:
            first = await events.next()  # what is refused is refused with a status of its own
            if isinstance(first, Failed):
                raise _failure(first)
            if asked.stream:
                streamed.pop_all()
                return StreamingResponse(
                    _stream(events, reply, asked.include_usage),
                    media_type="text/event-stream",
                    headers={"Cache-Control": "no-store"},
                )
            return await _whole(events, reply)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name != self._sessions.model:
            raise self._no_model(name)
        return JSONResponse(self._model())

    def _model(self) -> dict:
        return {
            "id": self._sessions.model,
            "object": "model",
            "created": self._started,
            "owned_by": "mlx-sleep",
        }

    def _no_model(self, name: str) -> ApiError:
        served = self._sessions.model
        message = f"there is no model {name!r} here; ask for {served!r}, or start "
        message += f"`mlx-sleep serve --model {name}`"
        return ApiError(404, message, param="model", code="model_not_found")

    # --- the memories ------------------------------------------------------------------------

    async def memories(self, request: Request) -> Response:
        """Names, and what is known without opening them."""
        try:
            listed = await run_in_threadpool(list_memories, self._sessions.home)
        except UserError as error:
            raise ApiError(503, str(error)) from error
        data = [
            {"name": memory.name, "open": self._sessions.named(memory.name) is not None}
            for memory in listed
        ]
        return JSONResponse({"object": "list", "data": data})

    async def memory(self, request: Request) -> Response:
        """A memory that is in RAM: its counters, and a sleep's progress. Others: open is false."""
        name = _checked(request.path_params["name"])
        slot = self._sessions.named(name)
        state = {"name": name, "open": slot is not None, "queued": self._engine.queued}
        return JSONResponse(state | (_state(slot) if slot else {}))

    async def sleep(self, request: Request) -> Response:
        name = _checked(request.path_params["name"])
        events = _Events(request)
        events.job = job = SleepJob(name, events.put)
        self._engine.submit(job)
        with events.cancelling():
            happened = await events.next()
        if isinstance(happened, Failed):
            raise _failure(happened)
        assert isinstance(happened, Slept)
        return JSONResponse({"slept": happened.report and asdict(happened.report)})

    async def transcript(self, request: Request) -> Response:
        """What was said in a memory, oldest first."""
        name = _checked(request.path_params["name"])
        if slot := self._sessions.named(name):
            pairs = [(turn.user, turn.reply) for turn in slot.conversation.turns]
        else:
            pairs = await run_in_threadpool(self._kept, name)
        turns = [{"user": user, "reply": reply} for user, reply in pairs]
        return JSONResponse({"turns": turns})

    def _kept(self, name: str) -> list[Pair]:
        """The transcript of a memory on the disk; none of one that doesn't exist."""
        try:
            found = Location.of(name, self._sessions.home).peek()
        except UserError as error:
            raise ApiError(409, str(error), code="memory_unavailable") from error
        return said(found[0].messages) if found else []

    # --- the page ----------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": self._policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(self._page, headers=headers | {"Referrer-Policy": "no-referrer"})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})


class _Events:
    """A job's events for the coroutine that answers `request`. Cancels the job when the client
    leaves."""

    def __init__(self, request: Request):
        self.job: Job | None = None
        self._request = request
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._left: asyncio.Task[None] | None = None

    def put(self, event: Event) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    async def next(self) -> Event:
        if not self._queue.empty():
            return self._queue.get_nowait()
        self._left = self._left or asyncio.create_task(self._leaves())
        event = asyncio.create_task(self._queue.get())
        try:
            await asyncio.wait({event, self._left}, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                return event.result()
            raise ApiError(499, "the client has left")
        finally:
            event.cancel()

    @contextlib.contextmanager
    def cancelling(self) -> Iterator[contextlib.ExitStack]:
        """Cancels the job, done or not, at the end of the with block."""
        with contextlib.ExitStack() as stack:
            stack.callback(self.cancel)
            yield stack

    def cancel(self) -> None:
        if self.job:
            self.job.cancelled.set()
        if self._left:
            self._left.cancel()

    async def _leaves(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass


async def _whole(events: _Events, reply: Reply) -> Response:
    text = ""
    while True:
        happened = await events.next()
        if isinstance(happened, Piece):
            text += happened.text
        elif isinstance(happened, Done):
            return JSONResponse(reply.whole(text, happened.finish, happened.usage))
        elif isinstance(happened, Failed):
            raise _failure(happened)


async def _stream(events: _Events, reply: Reply, include_usage: bool) -> AsyncIterator[bytes]:
    try:
        yield reply.chunk({"role": "assistant", "content": ""})
        while True:
            happened = await events.next()
            if isinstance(happened, Piece):
                yield reply.chunk({"content": happened.text})
            elif isinstance(happened, Done):
                yield reply.chunk({}, happened.finish)
                if include_usage:
                    yield reply.usage(happened.usage)
                yield event("[DONE]")
                return
            elif isinstance(happened, Failed):
                yield event(_failure(happened).body)
                return
    except ApiError:
        return  # the client has left
    finally:
        events.cancel()


async def _body(request: Request) -> bytes:
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > LARGEST_BODY:
            raise ApiError(413, f"the body is larger than {LARGEST_BODY:,} bytes")
    return bytes(raw)


def _memory_of(request: Request, asked: ChatRequest) -> str | None:
    """The memory of a request: the header's, or the user's, or None."""
    if name := request.headers.get(MEMORY_HEADER):
        return _checked(name)
    return memory_of_user(asked.user) if asked.user else None


def memory_of_user(user: str) -> str:
    """The name of a user's memory: the user's own where it can name one."""
    if NAME.fullmatch(user):
        return user
    digest = hashlib.sha256(user.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    words = re.sub("[^A-Za-z0-9]+", "-", user).strip("-")[:40] or "user"
    return f"{words}-{digest}"


def _checked(name: str) -> str:
    if not NAME.fullmatch(name):
        message = f"{name!r} cannot name a memory; use 1 to 64 letters, digits, dots, dashes and "
        message += "underscores, beginning with a letter or digit"
        raise ApiError(400, message, param=MEMORY_HEADER)
    return name


def _state(slot: Slot) -> dict:
    progress = slot.progress
    sleeping = progress and dict(zip(("pass", "passes", "share"), progress, strict=True))
    return {
        **asdict(slot.stats),
        "sleeping": sleeping,
        "waits": slot.waits,
        "can_sleep": slot.session.can_sleep,
    }


def _failure(failed: Failed) -> ApiError:
    error = failed.error
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(503 if isinstance(error.__cause__, OSError) else 400, str(error))
    return ApiError(500, "the server failed at this; its terminal has the details")


def _policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run, and nothing else
    is loaded."""

    def digest(tag: str) -> str:
        [text] = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return b64encode(hashlib.sha256(text.encode()).digest()).decode()

    return (
        f"default-src 'none'; script-src 'sha256-{digest('script')}'; "
        f"style-src 'sha256-{digest('style')}'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )


async def _api_error(request: Request, error: ApiError) -> Response:
    return JSONResponse(error.body, error.status)


async def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code)


async def _fault(request: Request, error: Exception) -> Response:
    message = "the server failed at this; its terminal has the details"
    return JSONResponse(ApiError(500, message).body, 500)
