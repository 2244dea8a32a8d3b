"""A new model folder, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..utils.atomic import fsync_path
from ..utils.errors import UserError
from ..utils.files import one_line, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its place when the block ends without an error.

    overwrite  replace all of `path`, which is an error otherwise. That takes two renames: a crash
               between them leaves the old folder whole, under a name that ends in `.old`

    A process that dies in the block leaves a hidden folder; the next one that writes to `path`
    removes it. Raises UserError, with the final path in its message.
    """
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists already; choose another name")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        fresh.mkdir()
        try:
            yield fresh
            for file in fresh.iterdir():
                fsync_path(file)
            fsync_path(fresh)
            _put_in_place(fresh, path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    except UserError as error:
        error.args = (str(error).replace(str(fresh), str(path)),)
        raise
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        reason = one_line(error).replace(str(fresh), str(path))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space there and try again"
        raise UserError(f"cannot write the model folder {path}: {reason}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files and generation_config.json, as far as they are there.

    Without the fields that name Python code to run (`auto_map`). UserError for damaged JSON.
    """
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if not (source / name).is_file():
            continue
        shutil.copyfile(source / name, folder / name)
        if name.endswith("_config.json"):
            fields = read_json(source / name)
            if fields.pop("auto_map", None) is not None:
                write_json(folder / name, fields)


def write_json(file: Path, value: dict) -> None:
    """One JSON object, indented, UTF-8."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _remove_leftovers(path: Path) -> None:
    name = re.compile(re.escape(f".{path.name}.") + r"(\d+)\.tmp")
    for other in path.parent.iterdir():
        match = name.fullmatch(other.name)
        if match and not _alive(int(match[1])):
            shutil.rmtree(other, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return process != os.getpid()


def _put_in_place(fresh: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    replacing = os.path.lexists(path)
    if replacing:
        os.rename(path, old)
    try:
        os.rename(fresh, path)
    except OSError:
        if replacing:
            os.rename(old, path)
        raise
    fsync_path(path.parent)
    if replacing and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    elif replacing:
        old.unlink()
