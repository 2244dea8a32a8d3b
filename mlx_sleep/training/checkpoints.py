"""Checkpoints of a training run: a folder that is written whole or not at all.

    checkpoint/model.safetensors, optimizer.safetensors, progress.json

The newest replaces the one before by two renames. A kill between them leaves the older one under
the name checkpoint.old, where `load` finds it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..utils.atomic import fsync_path
from ..utils.errors import UserError
from ..utils.files import one_line


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
        progress = {"step": checkpoint.step, "tokens": checkpoint.tokens}
        (new / "progress.json").write_text(json.dumps(progress))
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
    try:
        weights = _arrays(folder / "model.safetensors")
        optimizer = tree_unflatten(list(_arrays(folder / "optimizer.safetensors").items()))
        progress = json.loads((folder / "progress.json").read_text())
        return Checkpoint(weights, optimizer, progress["step"], progress["tokens"])
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the checkpoint in {run} cannot be read: {one_line(error)}; remove it to start from "
            "the first step"
        ) from error


def _arrays(file: Path) -> dict[str, mx.array]:
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)  # what a .safetensors file gives
    return arrays
