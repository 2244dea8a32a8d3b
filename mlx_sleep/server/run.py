"""The socket, uvicorn, and a stop that loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from ..utils.errors import UserError
from .engine import Engine
from .guard import is_loopback

FINISH = 10
"""Seconds that replies under way have to end after SIGTERM or Ctrl-C, before they are cut."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow is done. UserError when it cannot; port 0 takes
    a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        where = f"{host}:{port}"
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{where} is taken; stop what runs there, or choose a --port") from None
        remedy = "choose a --port above 1023" if error.errno == errno.EACCES else "check --host"
        reason = error.strerror or error
        raise UserError(f"cannot listen on {where}: {reason}; {remedy}") from error
    except (OverflowError, UnicodeError):
        raise UserError(f"cannot listen on {host}:{port}; check --host and --port") from None


def check_key(host: str, key: str | None) -> None:
    """UserError for an address that others can reach, without a key."""
    if key is not None and (not key.strip() or not key.isascii()):
        raise UserError("the API key must be of ASCII characters, and not empty")
    if key is None and not is_loopback(host):
        raise UserError(
            f"others can reach {host}: set an API key in $MLX_SLEEP_API_KEY, "
            "or leave out --host to serve this machine alone"
        )


class Server(uvicorn.Server):
    """uvicorn for `app`. When it is told to stop, replies have `finish` seconds to end; then, or
    when it is told again, the engine cuts them, and their clients are told."""

    def __init__(self, app: ASGIApp, engine: Engine, finish: float = FINISH):
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,  # nobody's messages or habits in a log
            server_header=False,
            timeout_graceful_shutdown=int(finish) + 5,  # for a client that doesn't read
            lifespan="on",
        )
        super().__init__(config)
        self._engine, self._finish = engine, finish

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # uvicorn would leave without ending the engine
            threading.Thread(target=self._engine.stop, daemon=True).start()
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()

        def cut() -> None:
            loop.run_in_executor(None, self._engine.stop)

        timer = loop.call_later(self._finish, cut)
        await super().shutdown(sockets)
        timer.cancel()


def run(app: ASGIApp, engine: Engine, listener: socket.socket) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    with _signals_end_here():
        Server(app, engine).run(sockets=[listener])


@contextlib.contextmanager
def _signals_end_here() -> Iterator[None]:
    """uvicorn raises the signal again that has stopped it, for the handler of before. Here that is
    nobody's business any more: all is done by then."""
    before = {s: signal.signal(s, lambda *_: None) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
