"""What `/set` changes in a chat: sampling, the longest reply, passes, thinking."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

from ..thoughts import Thinking
from ..utils.errors import UserError

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session


def _thinking(value: str) -> str:
    if value not in get_args(Thinking):
        raise ValueError
    return value


KINDS: dict[str, Callable[[str], Any]] = {
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
    "passes": int,
    "thinking": _thinking,
}
_TAKES = {
    float: ("a number", "1"),
    int: ("a whole number", "1"),
    _thinking: ("auto, on or off", "on"),
}
_ALSO = {"temperature": "temp", "num_predict": "max_tokens"}  # as transformers and ollama say


def values(session: Session) -> Iterator[str]:
    """A line for each setting; the seed is not kept anywhere."""
    sampling = session.sampling
    shown = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    shown |= {"max_tokens": session.max_tokens, "passes": session.passes}
    shown["thinking"] = session.thinking
    for name, value in shown.items():
        yield f"{name:<19} {value}"


def change(session: Session, text: str) -> str:
    """Carries out "temp 0.7": the line to show. UserError for what can't be set so."""
    name, _, value = text.replace("=", " ").replace("-", "_", 1).partition(" ")
    value = value.strip()
    name = _ALSO.get(name.lower(), name.lower())
    if name not in KINDS:
        raise UserError(f"there is no setting {name!r}; /set knows {', '.join(KINDS)}")
    try:
        found = KINDS[name](value)
    except ValueError:
        kind, example = _TAKES[KINDS[name]]
        raise UserError(
            f"{name} takes {kind}, as in /set {name} {example}, not {value!r}"
        ) from None
    if name == "seed":
        session.seed(found)
    elif name == "max_tokens":
        session.max_tokens = found
    elif name == "passes":
        session.passes = found
    elif name == "thinking":
        session.thinking = found
    else:
        session.sampling = replace(session.sampling, **{name: found})
    return f"{name} is {found:g}" if isinstance(found, float) else f"{name} is {found}"
