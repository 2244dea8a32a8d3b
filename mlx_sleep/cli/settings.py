"""What `/set` changes in a chat: sampling, the longest reply, passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ..utils.errors import UserError

if TYPE_CHECKING:  # it imports MLX
    from ..session import Session

KINDS: dict[str, Callable[[str], Any]] = {
    "temp": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "max_tokens": int,
    "passes": int,
}
_ALSO = {"temperature": "temp", "num_predict": "max_tokens"}  # as transformers and ollama say


def values(session: Session) -> Iterator[str]:
    """A line for each setting; the seed is not kept anywhere."""
    sampling = session.sampling
    shown = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    shown |= {"max_tokens": session.max_tokens, "passes": session.passes}
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
        number = KINDS[name](value)
    except ValueError:
        kind = "a whole number" if KINDS[name] is int else "a number"
        raise UserError(f"{name} takes {kind}, as in /set {name} 1, not {value!r}") from None
    if name == "seed":
        session.seed(number)
    elif name == "max_tokens":
        session.max_tokens = number
    elif name == "passes":
        session.passes = number
    else:
        session.sampling = replace(session.sampling, **{name: number})
    return f"{name} is {number:g}" if isinstance(number, float) else f"{name} is {number}"
