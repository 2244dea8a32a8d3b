"""JSON read into dataclasses. A wrong type or a number out of range is one line with the field.

A schema is a dataclass; its annotations say what a field holds: bool, int, float, str, dict,
list, `list[T]`, `dict[str, T]`, tuples, Literal, `T | None`, another dataclass, `Annotated[T,
Range]`. A whole number will do for a float; true, false, NaN and infinity are no numbers.
null in a field that has a default is the default: libraries write it for what isn't set.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from . import limits
from .errors import UserError
from .files import read_json

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Range:
    """low <= x, and x <= high unless the limits are lifted; of a list, its length."""

    low: float
    high: float = math.inf


Count = Annotated[int, Range(1, limits.WIDTH)]
"""A size: at least 1."""
CountOrZero = Annotated[int, Range(0, limits.WIDTH)]
"""A size where 0 stands for one that follows from others."""
Layers = Annotated[int, Range(1, limits.LAYERS)]
Vocabulary = Annotated[int, Range(1, limits.VOCABULARY)]
TokenId = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(5e-324)]
"""A number above 0."""


def read(cls: type[T], values: Any, where: str = "", *, closed: bool = False) -> T:
    """An instance of the dataclass cls from the contents of a JSON object.

    where   before a field's name in an error: "config.json: sleep."
    closed  refuse fields that cls doesn't have; else they are left out

    UserError names the field. The checks of cls's own __post_init__ run too.
    """
    owner = where.rstrip(".: ") or "it"
    if not isinstance(values, dict):
        raise UserError(f"{owner} must be an object, not {shown(values)}")
    hints = _hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    if closed and (unknown := sorted(set(values) - set(fields))):
        known = ", ".join(sorted(fields))
        raise UserError(f"{where}{unknown[0]} is not a known field; known: {known}")
    found, missing = {}, []
    for name, field in fields.items():
        required = field.default is MISSING and field.default_factory is MISSING
        if name not in values:
            if required:
                missing.append(name)
        elif values[name] is not None or required or _takes_null(hints[name]):
            found[name] = check(hints[name], values[name], f"{where}{name}")
    if missing:
        raise UserError(f"{owner} lacks {', '.join(missing)}")
    return cls(**found)


def read_file(cls: type[T], file: Path, *, closed: bool = False) -> T:
    """`read` of a JSON file. UserError names the file, too."""
    values = read_json(file)
    with naming(file):
        return read(cls, values, closed=closed)


@contextlib.contextmanager
def naming(file: Path | str) -> Iterator[None]:
    """UserErrors of the block begin with a file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def check_fields(cls: Any, values: Mapping[str, Any]) -> None:
    """UserError where a field of a foreign dataclass has another type than its annotation says.

    What lists and objects hold is not looked at, and annotations that aren't known pass.
    """
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        value = values.get(field.name)
        if field.name in values and not (value is None and field.default is None):
            check(_loose(hints[field.name]), value, field.name)


def check(kind: Any, value: Any, where: str) -> Any:
    """`value`, read as the annotation `kind`. UserError begins with `where`."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = check(arguments[0], value, where)
        for bound in arguments[1:]:
            _check_range(bound, value, where)
        return value
    choices = arguments if origin in (Union, types.UnionType) else (kind,)
    fitting = next((each for each in choices if _fits(each, value)), None)
    if fitting is None:
        raise UserError(f"{where} must be {_described(kind)}, not {shown(value)}")
    if fitting is not kind:
        return check(fitting, value, where)
    if dataclasses.is_dataclass(kind):
        return read(kind, value, f"{where}.")  # type: ignore[arg-type]
    if origin is list:
        return [check(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(value)]
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(check(arguments[0], x, f"{where}[{i}]") for i, x in enumerate(value))
    if origin is tuple:
        each = enumerate(zip(arguments, value, strict=True))
        return tuple(check(a, x, f"{where}[{i}]") for i, (a, x) in each)
    if origin is dict:
        return {name: check(arguments[1], x, f"{where}.{name}") for name, x in value.items()}
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


def _takes_null(kind: Any) -> bool:
    return kind is Any or _fits(kind, None)


def _fits(kind: Any, value: Any) -> bool:
    """Whether a value is of a kind by its own type, whatever is in it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _fits(arguments[0], value)
    if origin in (Union, types.UnionType):
        return any(_fits(each, value) for each in arguments)
    if origin is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if kind is int:
        return type(value) is int
    if kind is float:  # a whole number may be too large for one
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is str:
        return isinstance(value, str) and _is_unicode(value)
    if kind is bool or kind is types.NoneType:
        return type(value) is bool if kind is bool else value is None
    if kind is dict or origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (list, tuple) or origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        exact = origin is tuple and arguments[-1] is not Ellipsis
        return len(value) == len(arguments) if exact else True
    return True


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _loose(kind: Any) -> Any:
    """The annotation without what it says of a container's insides."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return Union[tuple(_loose(each) for each in arguments)]  # noqa: UP007
    if origin in (list, tuple):
        # mlx-lm splits a string where its annotation says a list of them.
        return list | str if arguments[0] is str else list
    if origin is dict or dataclasses.is_dataclass(kind):
        return dict
    return kind if kind in (bool, int, float, str, dict, list, types.NoneType) else Any


def _check_range(bound: Range, value: Any, where: str) -> None:
    if isinstance(value, list | str):
        value, where = len(value), f"the length of {where}"
    if value < bound.low:
        least = "above 0" if 0 < bound.low < 1 else f">= {bound.low:,}"
        raise UserError(f"{where} must be {least}, not {shown(value)}")
    limits.check(where, value, bound.high)


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _described(arguments[0])
    if origin in (Union, types.UnionType):
        # null is an answer only where nothing else was wanted.
        named = [_described(each) for each in arguments if each is not types.NoneType]
        return " or ".join(dict.fromkeys(named))
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (list, tuple):
        if origin is tuple and arguments[-1] is not Ellipsis:
            return f"a list of {len(arguments)}"
        return f"a list of {_PLURALS.get(arguments[0], 'values')}"
    if origin is dict or dataclasses.is_dataclass(kind):
        return "an object"
    return _NAMES.get(kind, str(kind))


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "an object",
    list: "a list",
}
_PLURALS: dict[Any, str] = {
    int: "whole numbers",
    float: "numbers",
    str: "strings",
    dict: "objects",
}


def shown(value: Any) -> str:
    """A value of JSON in an error, not too long."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = repr(type(value))
    return text if len(text) <= 60 else text[:57] + "..."
