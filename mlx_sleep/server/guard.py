"""Who may ask: the Host header, the Origin header, the API key. An ASGI middleware.

A server on the loopback address is reached by every web page that the user's browser shows. Two
checks keep those out: the Host header must name this machine (a page whose name was rebound to
127.0.0.1 sends its own), and an Origin must be the server's own or one that was allowed.
"""

from __future__ import annotations

import ipaddress
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from .wire import ApiError

OPEN_PATHS = ("/", "/health")
"""What is shown without a key: the page, which asks for one, and whether the server is up."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Guard:
    """Answers what may not pass with an error, the rest goes to `app`.

    host     the address that the server listens on
    key      the API key, or None where none is asked for
    origins  origins of other web pages that may ask, as browsers write them
    """

    def __init__(self, app: ASGIApp, host: str, key: str | None, origins: frozenset[str]):
        self._app, self._key, self._origins = app, key, origins
        # By which names others reach a server on a network is not known here; its key guards it.
        self._local = is_loopback(host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], scope["method"], Headers(scope=scope))
            except ApiError as error:
                response = JSONResponse(error.body, error.status)
                if error.status == 401:
                    response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, method: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if self._local and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise ApiError(403, "this server answers to localhost only; check the URL")
        origin = headers.get("origin")
        same = origin is not None and urlsplit(origin).netloc == host
        if origin is not None and not same and origin not in self._origins:
            message = f"web pages of {origin} may not ask; start the server with --allow-origin"
            raise ApiError(403, message)
        if self._key is None or path in OPEN_PATHS or method == "OPTIONS":
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not given:
            message = "no API key; send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        if not secrets.compare_digest(given.strip().encode(), self._key.encode()):
            raise ApiError(401, "wrong API key", code="invalid_api_key")
