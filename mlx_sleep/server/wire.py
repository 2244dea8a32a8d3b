"""OpenAI's chat completions as data: requests read, replies and errors written.

Source: the API reference, platform.openai.com/docs/api-reference/chat. What this server cannot do
is refused by its parameter's name, never ignored. Knows no session and no HTTP library.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


class ApiError(Exception):
    """An answer that is an error. status is HTTP's; the others are the fields of its body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    @property
    def body(self) -> dict:
        types = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": types.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class ChatRequest:
    """A chat completion that is asked for.

    history     (user, reply) pairs before the new turn; a reply may be "" (it never came)
    text        the new turn
    system      the system messages, joined; "" for none
    sampling    settings of `Sampling` that were given; the model's own stand for the others
    max_tokens  None is the server's own
    seed        None draws as it comes
    """

    model: str
    text: str
    history: list[tuple[str, str]] = field(default_factory=list)
    system: str = ""
    max_tokens: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    user: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a completion. prompt: those that the reply attends to, in the window;
    cached: those of them that had been read before this request."""

    prompt: int
    completion: int
    cached: int

    @property
    def body(self) -> dict:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def read_request(raw: bytes) -> ChatRequest:
    """The request in a body. ApiError 400 for anything that is none."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be one JSON object")
    _refuse_unsupported(body)
    system, history, text = _read_messages(body.get("messages"))
    limit = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    options = _typed(body, "stream_options", dict) or {}
    return ChatRequest(
        model=_required(body, "model"),
        text=text,
        history=history,
        system=system,
        max_tokens=_integer(body, limit, 1, 2**31),
        sampling=_read_sampling(body),
        # OpenAI's seeds may be negative; the session's may not.
        seed=None if (seed := _integer(body, "seed", -(2**63), 2**63)) is None else seed % 2**64,
        stop=_read_stop(body.get("stop")),
        stream=bool(_typed(body, "stream", bool)),
        include_usage=bool(options.get("include_usage")),
        user=_typed(body, "user", str),
    )


# What a client may send as long as it asks for nothing: parameter -> values that do.
_NOTHING: dict[str, tuple] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
}


def _refuse_unsupported(body: dict) -> None:
    for name, harmless in _NOTHING.items():
        if body.get(name) not in harmless:
            raise ApiError(400, f"{name} is not supported here; leave it out", param=name)


def _read_messages(messages: Any) -> tuple[str, list[tuple[str, str]], str]:
    """(system, history, the new turn)"""
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a list with at least one message", param="messages")
    system: list[str] = []
    turns: list[tuple[str, str]] = []
    last: Any = None
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise ApiError(400, f"{where} must be an object", param=where)
        last = message.get("role")
        text = _content(message.get("content"), where, empty=last == "assistant")
        if last in ("system", "developer"):
            system.append(text)
        elif last == "user":
            turns.append((text, ""))
        elif last == "assistant" and turns:
            user, reply = turns[-1]
            turns[-1] = (user, f"{reply}\n{text}" if reply else text)
        elif last == "assistant":
            raise ApiError(400, f"{where}: a user's message must come first", param=where)
        else:
            raise ApiError(
                400, f"{where}.role must be system, user or assistant", param=f"{where}.role"
            )
    if last != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")
    return "\n\n".join(system), turns[:-1], turns[-1][0]


def _content(content: Any, where: str, empty: bool) -> str:
    """A message's text, stripped: a string, or a list of text parts."""
    param = f"{where}.content"
    if isinstance(content, list):
        parts: list[Any] = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ApiError(400, f"{param}: only parts of type text are read", param=param)
            parts.append(part.get("text"))
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if content is None and empty:
        return ""
    if not isinstance(content, str):
        raise ApiError(400, f"{param} must be a string or a list of text parts", param=param)
    try:
        content.encode()
    except UnicodeEncodeError:
        raise ApiError(400, f"{param} is not valid Unicode", param=param) from None
    if not content.strip() and not empty:
        raise ApiError(400, f"{param} is empty", param=param)
    return content.strip()


def _read_sampling(body: dict) -> dict[str, Any]:
    """Settings by the session's names. The last three are mlx_lm.server's, not OpenAI's."""
    settings = {
        "temp": _number(body, "temperature", 0, 2),
        "top_p": _number(body, "top_p", 0, 1),
        "top_k": _integer(body, "top_k", 0, 2**31),
        "min_p": _number(body, "min_p", 0, 1),
        "repetition_penalty": _number(body, "repetition_penalty", 0, 10),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _read_stop(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError(400, "stop must be a string or a list of strings", param="stop")
    return tuple(stops)


def _required(body: dict, name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} must be a string", param=name)
    return value


def _typed(body: dict, name: str, kind: type) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        names = {bool: "true or false", str: "a string", dict: "an object"}
        raise ApiError(400, f"{name} must be {names[kind]}", param=name)
    return value


def _number(body: dict, name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ApiError(400, f"{name} must be a number from {low} to {high}", param=name)
    return float(value)


def _integer(body: dict, name: str, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < high:
        bound = f" of at least {low}" if low > 0 else ""
        raise ApiError(400, f"{name} must be a whole number{bound}", param=name)
    return value


class Reply:
    """Writes the completions of one request, whole or in chunks of a stream."""

    def __init__(self, model: str):
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, usage: Usage) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": usage.body,
        }

    def chunk(self, delta: dict, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._event([choice])

    def usage(self, usage: Usage) -> bytes:
        return self._event([], usage=usage.body)

    def _event(self, choices: list, **more: Any) -> bytes:
        return event({**self._head, "object": "chat.completion.chunk", "choices": choices, **more})


def event(body: dict | str) -> bytes:
    """A server-sent event."""
    return f"data: {body if isinstance(body, str) else json.dumps(body)}\n\n".encode()


class StopStrings:
    """Cuts a stream of text before the first of `stops`, holding back what may begin one."""

    def __init__(self, stops: tuple[str, ...]):
        self._stops, self._held = stops, ""
        self.hit = False

    def feed(self, piece: str) -> str:
        """The text that is certain by now."""
        self._held += piece
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.hit = True
            text, self._held = self._held[: min(found)], ""
            return text
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        cut = len(self._held) - kept
        text, self._held = self._held[:cut], self._held[cut:]
        return text

    def rest(self) -> str:
        """What was held back, at the end of the reply."""
        text, self._held = self._held, ""
        return text

    def _overlap(self, stop: str) -> int:
        """How many characters at the end may be the beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0
