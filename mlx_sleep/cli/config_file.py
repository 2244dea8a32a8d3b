"""The user's config file: defaults of chat and its like, in TOML.

    model = "smollm2"
    memory = "work"
    temp = 0.7

A flag is stronger than an environment variable, and that than the file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import platformdirs

from ..utils import atomic, schema
from ..utils.errors import UserError
from ..utils.files import expanded, os_errors_as_user_errors
from ..utils.schema import Count, CountOrZero, Positive, Range

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMANDS = ("chat", "generate", "serve", "sleep")
"""The commands that read it, each what it has an option for."""

_Part = Annotated[float, Range(0, 1)]


@dataclass
class Config:
    """The keys of the file, by the names of the options. None is not set."""

    model: str | None = None
    adapter_path: str | None = None
    memory: str | None = None
    passes: Count | None = None
    window: Annotated[int, Range(2)] | None = None
    max_tokens: Count | None = None
    temp: Annotated[float, Range(0)] | None = None
    top_p: _Part | None = None
    top_k: CountOrZero | None = None
    min_p: _Part | None = None
    repetition_penalty: Positive | None = None
    seed: Annotated[int, Range(0)] | None = None
    idle: Annotated[float, Range(0)] | None = None
    history: bool | None = None


KEYS = tuple(field.name for field in fields(Config))


def path() -> Path:
    """$MLX_SLEEP_CONFIG, else config.toml in the platform's folder for configs."""
    if chosen := os.environ.get("MLX_SLEEP_CONFIG"):
        return expanded(chosen)
    return platformdirs.user_config_path("mlx-sleep", appauthor=False) / "config.toml"


def read() -> dict[str, Any]:
    """What is set, by key; empty without a file. UserError, in one line, for a wrong file."""
    return parse(_text())


def parse(text: str) -> dict[str, Any]:
    """What a file's text sets."""
    file = path()
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is not TOML: {error}; mend or remove it") from None
    with schema.naming(file):
        config = schema.read(Config, values, closed=True)
    return {key: value for key in KEYS if (value := getattr(config, key)) is not None}


def defaults(command: str) -> dict[str, Any]:
    """Defaults of a command's options, as click takes them."""
    values = read()
    if command == "generate":  # it remembers where it is asked to
        values.pop("memory", None)
    return values


def check_key(key: str) -> None:
    """UserError for a key that the file can't have."""
    if key not in KEYS:
        raise UserError(f"there is no setting {key!r}; there are {', '.join(KEYS)}")


def put(key: str, value: str | None) -> None:
    """Set a key to a value as it is typed, or remove it (None); the rest of the file stays.

    UserError for an unknown key or a value that doesn't fit.
    """
    check_key(key)
    text = _text()
    parse(text)  # a wrong file is not made worse
    line = None if value is None else f"{key} = {_literal(key, value)}\n"
    lines = [x for x in text.splitlines(True) if not re.match(rf"\s*{key}\s*=", x)]
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += "\n"
    text = "".join([*lines, *([line] if line else [])])
    parse(text)
    file = path()
    with os_errors_as_user_errors(f"cannot write {file}", "check the folder"):
        atomic.make_folder(file.parent)
        atomic.replace_file(file, text.encode())
        atomic.fsync_path(file.parent)


def _literal(key: str, value: str) -> str:
    """A typed value in TOML: a number or bool as it is, where the key takes one."""
    hint = str(Config.__annotations__[key])
    if hint.startswith("str"):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if hint.startswith("bool"):
        value = {"on": "true", "yes": "true", "off": "false", "no": "false"}.get(value, value)
    try:
        tomllib.loads(f"{key} = {value}\n")
        if "\n" in value:
            raise ValueError
    except ValueError:
        return json.dumps(value, ensure_ascii=False)  # its type is refused then, with the key
    return value


def _text() -> str:
    file = path()
    with os_errors_as_user_errors(f"cannot read {file}", "check it"):
        if not os.path.lexists(file):
            return ""
        if not file.is_file():
            raise UserError(f"{file} is not a file; remove it")
        try:
            return file.read_bytes().decode()
        except UnicodeDecodeError:
            raise UserError(f"{file} is not UTF-8; mend or remove it") from None
