"""One run of a study: train a model in its folder, examine it, leave result.json.

    python -m mlx_sleep.lab.study.run FOLDER < settings.json

is how a study starts it: a process of its own, with its own BLAS threads. A run that was stopped
goes on from its last checkpoint; one that is done is left alone.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from ...memory.lock import InUse, Lock
from ...utils.atomic import replace_file
from ...utils.errors import UserError

RESULT = "result.json"
TOKENIZER = "tokenizer.model"


def make_task(settings: dict, tokenizer: Path | None = None):
    """The task of a plan or of a run's settings. gsm reads its tokenizer from a file."""
    from ..tasks.depo import Depo
    from ..tasks.gsm import Gsm
    from ..tasks.rule110 import Rule110

    world = {**settings["world"]}
    try:
        if settings["task"] == "gsm":
            world["tokenizer"] = _tokenizer(world, tokenizer)
        kind = {"rule110": Rule110, "depo": Depo, "gsm": Gsm}[settings["task"]]
        return kind(**world)
    except (TypeError, ValueError) as error:
        raise UserError(f"the plan's world does not fit {settings['task']}: {error}") from None


def _tokenizer(world: dict, path: Path | None) -> bytes:
    """What the file has, or else a new tokenizer, put there; its own options leave the world."""
    from ..tasks.gsm import make_tokenizer

    options = {key: world.pop(key) for key in ("vocab_size", "phrases") if key in world}
    if path is not None and path.exists():
        return path.read_bytes()
    if "names" in world:
        options["names"] = world["names"]
    try:
        data = make_tokenizer(**options)
    except (RuntimeError, OSError) as error:  # sentencepiece's, for a size it can't make
        raise UserError(f"no tokenizer with {options}: {error}") from None
    if path is not None:
        replace_file(path, data)
    return data


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
        raise UserError(f"{path} is damaged; remove the folder to run it anew")
    _refuse_other(folder, result.get("settings"), settings)
    return result


def _refuse_other(folder: Path, theirs, settings: dict):
    # A recipe that a kill cut short is the trainer's business.
    if theirs is not None and theirs != json.loads(json.dumps(settings)):
        raise UserError(
            f"{folder} holds a run with another config; choose another --out, or remove it"
        )


def _json(path: Path):
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def train(settings: dict, folder: Path, after_step: Callable[[], None] | None = None) -> dict:
    """Trains and examines one run, or goes on with it: its result, also in folder/result.json.

    after_step may raise to stop it; what is behind the last checkpoint is then done again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Lock(folder / "lock"):
            result = finished(folder, settings)
            return result if result is not None else _train(settings, folder, after_step)
    except InUse as error:
        raise UserError(
            f"process {error.holder} is at work in {folder}; wait for it, or end it"
        ) from None


def _train(settings: dict, folder: Path, after_step) -> dict:
    from mlx.utils import tree_flatten

    from . import models
    from .score import examine

    task = make_task(settings, folder.parent / TOKENIZER)
    stages = models.stages_of(settings)
    weights, tokens, seconds, first = None, 0, 0.0, 0
    for i, stage in enumerate(stages):
        where = folder if len(stages) == 1 else folder / f"stage-{i + 1}"
        model = models.build(settings, stage, task)
        if weights is not None:
            model.load_weights(weights)
        kept = models.keeps_context(settings, stage)
        trainer = _trainer(settings, stage, task, model, where, first, kept)
        curve = Curve(where, settings, task, model, kept, tokens, after_step)
        check_metrics(where)
        trainer.run(curve.on_step)
        tokens, seconds = tokens + trainer.tokens, seconds + _seconds(where)
        first += stage["steps"]
        weights = tree_flatten(model.parameters())
    rows = []
    for difficulty in settings["asked"]:
        for passes in asked_passes(settings):
            n = settings["evaluate"]["test"]
            got = examine(model, task, "test", n, difficulty, passes, kept)
            rows.append({"difficulty": difficulty, "passes": passes, "tokens": tokens, **got})
    result = {
        "settings": settings,
        "tokens": tokens,
        "seconds": seconds,
        "rows": rows,
        "curve": curve.rows(),
        **_beyond(settings, task, model, kept),
    }
    replace_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def asked_passes(settings: dict) -> list[int]:
    """With which N a model is examined: with all that it was trained with."""
    return sorted(set(settings["passes"]))


def _trainer(settings, stage, task, model, folder, first, kept):
    from ...training.trainer import Trainer
    from .score import chunks_of

    def plan(step):
        draw = Random(f"{settings['seed']}/{first + step}")
        passes = draw.choice(settings["passes"])
        start = (first + step) * settings["batch"]
        indices = range(start, start + settings["batch"])
        # Every seed has its own order of data, the same for all models.
        own = [settings["seed"] << 40 | i for i in indices]
        return chunks_of(task.batch("train", own, settings["difficulty"]), kept), passes

    single = len(settings["variant"].get("stages", [{}])) == 1
    recipe = settings if single else {**settings, "stage": stage}
    return Trainer(
        model,
        folder,
        recipe,
        stage["steps"],
        plan,
        save_every=settings["evaluate"]["every"],
        **settings["trainer"],
    )


class Curve:
    """Accuracy during training, on the valid split: folder/evaluations.jsonl.

    tokens: of the stages before this one. after_step is called behind every step.
    """

    def __init__(self, folder, settings: dict, task, model, kept: bool, tokens: int, after_step):
        self.path = folder / "evaluations.jsonl"
        self.settings, self.task, self.model = settings, task, model
        self.kept, self.tokens = kept, tokens
        self.after_step = after_step

    def on_step(self, row: dict):
        if row["step"] % self.settings["evaluate"]["every"] == 0:
            self._examine(row)
        if self.after_step:
            self.after_step()

    def _examine(self, row: dict):
        from .score import examine

        n = self.settings["evaluate"]["valid"]
        passes = max(self.settings["passes"])
        with open(self.path, "a") as file:
            for difficulty in self.settings["asked"]:
                got = examine(self.model, self.task, "valid", n, difficulty, passes, self.kept)
                tokens = self.tokens + row["tokens"]
                new = {"difficulty": difficulty, "passes": passes, "tokens": tokens, **got}
                file.write(json.dumps(new) + "\n")

    def rows(self) -> list[dict]:
        """One row for each difficulty and number of tokens, in order.

        A stopped run has repeated the steps behind its checkpoint, and its last row may be cut.
        """
        rows = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                rows[row["tokens"], row["difficulty"]] = row
        return [rows[key] for key in sorted(rows)]


def check_metrics(folder: Path) -> None:
    """UserError when a checkpoint stands behind rows that metrics.jsonl no longer has."""
    progress = folder / "checkpoint" / "progress.json"
    if not progress.exists():
        return
    done = _json(progress)
    steps = _steps(folder)
    if done and steps[: done["step"]] != list(range(1, done["step"] + 1)):
        raise UserError(
            f"{folder / 'metrics.jsonl'} was cut short: the checkpoint is at step {done['step']}; "
            "remove the folder to run it anew"
        )


def _steps(folder: Path) -> list[int]:
    return [row["step"] for row in _metrics(folder)]


def _seconds(folder: Path) -> float:
    return sum(row["seconds"] for row in _metrics(folder))


def _metrics(folder: Path) -> list[dict]:
    rows = []
    path = folder / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _beyond(settings: dict, task, model, kept: bool) -> dict:
    """The questions beyond the paper, for models that sleep with hard eviction."""
    from .score import halting, retention

    beyond = settings["beyond"]
    asked = beyond.get("difficulty")
    if kept or model.sleep.eviction != "hard" or settings["difficulty"] not in (None, asked):
        return {"retention": [], "halting": []}
    n, most = beyond["examples"], max(settings["passes"])
    fixed = len(settings["passes"]) == 1
    first = beyond.get("retention_difficulty", asked)
    return {
        "retention": list(retention(model, task, n, first, most, beyond["further"])),
        # A threshold is for a model that works at every N.
        "halting": []
        if fixed
        else list(halting(model, task, n, asked, most, beyond["thresholds"])),
    }


def main() -> None:
    parent = os.getppid()

    def after_step():
        if os.getppid() != parent:
            sys.exit("error: the study that started this run is gone")

    try:
        train(json.loads(sys.stdin.read()), Path(sys.argv[1]), after_step)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
