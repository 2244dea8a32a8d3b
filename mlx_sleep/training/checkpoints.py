"""Checkpoints of a training run: a folder that is written whole or not at all.

    checkpoint/model.safetensors, optimizer.safetensors, progress.json

The newest replaces the one before by two renames. A kill between them leaves the older one under
the name checkpoint.old, where `load` finds it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..utils import schema
from ..utils.atomic import fsync_path
from ..utils.errors import UserError
from ..utils.files import one_line, read_json
from ..utils.safetensors import read_header
from ..utils.schema import Range

PROGRESS = "progress.json"


class Checkpoint(NamedTuple):
    """weights by name, the optimizer's state as a tree, steps done, and tokens seen in them."""

    weights: dict[str, mx.array]
    optimizer: Any
    step: int
    tokens: int


def save(run: Path, checkpoint: Checkpoint) -> None:
    """Writes run/checkpoint. UserError where it cannot; the one before then stays."""
    new, current, old = (run / f"checkpoint{suffix}" for suffix in (".new", "", ".old"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        optimizer = dict(tree_flatten(checkpoint.optimizer))
        mx.save_safetensors(str(new / "model.safetensors"), checkpoint.weights)
        mx.save_safetensors(str(new / "optimizer.safetensors"), optimizer)
        write_progress(new, {"step": checkpoint.step, "tokens": checkpoint.tokens})
        for path in new.iterdir():
            fsync_path(path)
        fsync_path(new)
        if current.exists():  # else a kill has left `old` as the only one
            shutil.rmtree(old, ignore_errors=True)
            current.rename(old)
        new.rename(current)
        fsync_path(run)
    except (OSError, RuntimeError) as error:  # MLX raises the second for a full disk
        raise UserError(
            f"cannot write a checkpoint to {run}: {one_line(error)}; free some space there, "
            "and the same command goes on from the one before"
        ) from error
    shutil.rmtree(old, ignore_errors=True)


def load(run: Path) -> Checkpoint | None:
    """The newest checkpoint of a run, or None. UserError for one that is damaged."""
    folder = run / "checkpoint"
    if not folder.exists():
        folder = run / "checkpoint.old"
    if not folder.exists():
        return None
    with naming_damage(run, "remove it to start from the first step"):
        progress = read_progress(folder, Progress)
        weights = _arrays(folder / "model.safetensors")
        optimizer = tree_unflatten(list(_arrays(folder / "optimizer.safetensors").items()))
    return Checkpoint(weights, optimizer, progress.step, progress.tokens)


@dataclass
class Progress:
    """What progress.json says, and every trainer's has."""

    step: Annotated[int, Range(0)]
    tokens: Annotated[int, Range(0)]


P = TypeVar("P")


def write_progress(folder: Path, progress: dict) -> None:
    """Writes progress.json beside the weights, with a checksum over all of the checkpoint."""
    sealed = {**progress, "sha256": _checksum(folder, progress)}
    (folder / PROGRESS).write_text(json.dumps(sealed))


def read_progress(folder: Path, kind: type[P]) -> P:
    """What progress.json says, as the dataclass `kind`. UserError where the checkpoint is not what
    was written; checkpoints of earlier versions have no checksum."""
    file = folder / PROGRESS
    progress = read_json(file)
    written = progress.pop("sha256", None)
    with schema.naming(file):
        found = schema.read(kind, progress)
    if written is not None and written != _checksum(folder, progress):
        raise UserError(f"{folder} is damaged: its checksum is another")
    return found


@contextlib.contextmanager
def naming_damage(run: Path, remedy: str) -> Iterator[None]:
    """Turns what reading a checkpoint raises into a UserError that says what to do."""
    try:
        yield
    except (KeyError, OSError, RuntimeError, TypeError, UserError, ValueError) as error:
        raise UserError(
            f"the checkpoint in {run} cannot be read: {one_line(error)}; {remedy}"
        ) from error


def _checksum(folder: Path, progress: dict) -> str:
    digest = hashlib.sha256(json.dumps(progress, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as opened:
            digest.update(file.name.encode())
            while block := opened.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _arrays(file: Path) -> dict[str, mx.array]:
    read_header(file)  # checks it: MLX's reader trusts it
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)  # what a .safetensors file gives
    return arrays
