"""A training run's recipe.json and metrics.jsonl: readable at any time, whatever kills the run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from ..utils.atomic import fsync_path, replace_file
from ..utils.errors import UserError
from ..utils.files import os_errors_as_user_errors, read_json, reading


def open_run(folder: Path, settings: dict, *, write: bool = True) -> None:
    """Starts the folder of a run with recipe.json, or checks that the one there is of this run.

    settings  what recipe.json holds
    write     whether this process writes it: one of several does

    UserError when the folder holds a run with other settings.
    """
    recipe = folder / "recipe.json"
    text = json.dumps(settings, indent=2, sort_keys=True)
    if recipe.exists():
        if read_json(recipe) != json.loads(text):
            raise UserError(
                f"{folder} holds a run with another recipe; choose another --out, or remove it"
            )
        return
    with os_errors_as_user_errors(f"cannot write to {folder}", "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        if write:
            replace_file(recipe, text.encode())
            fsync_path(folder)


def check_run(folder: Path, resume: bool) -> None:
    """UserError where a folder can't take a run of a retrofit: it holds one that isn't to be
    resumed, none that is, or what a run would write over."""
    if resume:
        if not (folder / "recipe.json").exists():
            raise UserError(f"{folder} holds no run; leave out --resume to start one")
        return
    if (folder / "recipe.json").exists():
        raise UserError(
            f"{folder} holds a run already; add --resume to go on with it, or choose another --out"
        )
    for name, what in (("adapter_config.json", "an adapter"), ("config.json", "a model")):
        if (folder / name).exists():
            raise UserError(f"{folder} holds {what}; choose another --out")


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, up to the first that is none: one was cut short by a power
    failure. Empty where there is no file."""
    rows: list[dict] = []
    with reading(path):
        lines = path.read_bytes().splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except (RecursionError, ValueError):
            break
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


class Metrics:
    """metrics.jsonl: one JSON object a line, a line for each step."""

    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"

    def keep_until(self, step: int) -> None:
        """Drops the rows after `step`: those of steps that will be done again."""
        if not self._path.exists():
            return
        kept = [row for row in read_rows(self._path) if row["step"] <= step]
        rows = [json.dumps(row) + "\n" for row in kept]
        with self._one_line_errors():
            replace_file(self._path, "".join(rows).encode())

    def append(self, row: dict) -> None:
        """One more row, by a single write: a kill leaves all of it or nothing."""
        line = (json.dumps(row) + "\n").encode()
        with self._one_line_errors():
            file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                size = os.fstat(file).st_size
                written = os.write(file, line)
                if written < len(line):  # the disk is full
                    os.ftruncate(file, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(file)

    def _one_line_errors(self):
        return os_errors_as_user_errors(f"cannot write {self._path}", "make it writable")
