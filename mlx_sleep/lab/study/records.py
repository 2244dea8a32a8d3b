"""What a run leaves in its folder, read again: result.json, evaluations.jsonl, metrics.jsonl.

A run may have been killed at any time: the last row of a .jsonl file may be cut, and rows that
were written after the last checkpoint are there twice once the run has gone on.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from ...training.checkpoints import PROGRESS, Progress
from ...training.run_folder import read_rows
from ...utils import schema
from ...utils.errors import UserError

RESULT = "result.json"
EVALUATIONS = "evaluations.jsonl"


def finished(folder: Path, settings: dict) -> dict | None:
    """The result in a run's folder, None without one; UserError when it is another config's."""
    path = folder / RESULT
    if not path.exists():
        recipe = folder / "recipe.json"
        if recipe.exists():
            _refuse_other(folder, _json(recipe), settings)
        return None
    result = _json(path)
    if not isinstance(result, dict) or "rows" not in result:
        raise UserError(f"{path} is damaged; remove the folder to start the run again")
    _refuse_other(folder, result.get("settings"), settings)
    return result


def _refuse_other(folder: Path, theirs, settings: dict) -> None:
    # A recipe that a kill cut short is left to the trainer.
    if theirs is not None and theirs != json.loads(json.dumps(settings)):
        raise UserError(
            f"{folder} holds a run with another config; choose another --out, or remove it"
        )


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def check_metrics(folder: Path) -> None:
    """UserError when metrics.jsonl has lost rows of steps that the checkpoint has done."""
    file = folder / "checkpoint" / PROGRESS
    if not file.exists():
        return
    done = schema.read_file(Progress, file).step
    steps = [row["step"] for row in _metrics(folder)]
    if steps[:done] != list(range(1, done + 1)):
        raise UserError(
            f"{folder / 'metrics.jsonl'} was cut short: the checkpoint is at step {done}; "
            "remove the folder to start the run again"
        )


def training_seconds(folder: Path) -> float:
    return sum(float(row.get("seconds", 0)) for row in _metrics(folder))


def _metrics(folder: Path) -> list[dict]:
    return read_rows(folder / "metrics.jsonl")


def steps_done(folder: Path) -> int:
    """Steps that a run has done, all stages together."""
    done = 0
    for path in (folder / "metrics.jsonl", *sorted(folder.glob("stage-*/metrics.jsonl"))):
        if path.exists():
            done += path.read_bytes().count(b"\n")
    return done


def evaluations(folder: Path) -> list[dict]:
    """Accuracy during training: a row for each number of tokens and difficulty, in order."""
    rows = {}
    path = folder / EVALUATIONS
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(RecursionError, UserError, ValueError):  # one that was cut short
            row = json.loads(line)
            read = schema.read(Evaluation, row)
            rows[read.tokens, read.difficulty] = row
    return [rows[key] for key in sorted(rows)]


@dataclass
class Evaluation:
    """What a row of evaluations.jsonl is sorted by, and shows."""

    tokens: int
    difficulty: int
    accuracy: float
