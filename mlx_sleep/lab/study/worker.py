"""One run of a study: train a model in its folder, examine it, write result.json.

    python -m mlx_sleep.lab.study.worker FOLDER < settings.json

A study starts each run this way: a process of its own, with its own BLAS threads. A run that was
stopped goes on from its last checkpoint; one that is finished is not run again.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

from ...training.trainer import Trainer
from ...training.windows import Window
from ...utils.atomic import replace_file
from ...utils.errors import UserError
from ...utils.lock import InUse, Lock
from ...utils.malloc import keep_freed_memory
from . import models
from .probes import halting, retention
from .records import (
    EVALUATIONS,
    RESULT,
    check_metrics,
    evaluations,
    finished,
    training_seconds,
)
from .score import batch_windows, examine
from .task import TOKENIZER, Task, make_task


def train(settings: dict, folder: Path, after_step: Callable[[], None] | None = None) -> dict:
    """Trains and examines one run, or goes on with it: its result, also in folder/result.json.

    after_step may raise to stop it; steps after the last checkpoint are then repeated.
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


def _train(settings: dict, folder: Path, after_step: Callable[[], None] | None) -> dict:
    task = make_task(settings, folder.parent / TOKENIZER)
    stages = models.stages_of(settings)
    weights, tokens, seconds, first = None, 0, 0.0, 0
    for i, stage in enumerate(stages):
        where = folder if len(stages) == 1 else folder / f"stage-{i + 1}"
        model = models.build(settings, stage, task)
        if weights is not None:
            model.update(weights)
        kept = models.keeps_context(settings, stage)
        trainer = make_trainer(settings, stage, task, model, where, first, kept)
        evaluation = Evaluation(where, settings, task, model, kept, tokens, after_step)
        check_metrics(where)
        trainer.run(evaluation.on_step)
        tokens, seconds = tokens + trainer.tokens, seconds + training_seconds(where)
        first += stage["steps"]
        weights = model.parameters()
    rows = []
    for difficulty in settings["asked"]:
        for passes in sorted(set(settings["passes"])):
            n = settings["evaluate"]["test"]
            scores = examine(model, task, "test", n, difficulty, passes, kept)
            rows.append({"difficulty": difficulty, "passes": passes, "tokens": tokens, **scores})
    result = {
        "settings": settings,
        "tokens": tokens,
        "seconds": seconds,
        "rows": rows,
        "curve": evaluations(where),
        **_beyond(settings, task, model, kept),
    }
    replace_file(folder / RESULT, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def make_trainer(
    settings: dict, stage: dict, task: Task, model, folder: Path, first: int, kept: bool
) -> Trainer:
    """The trainer of one stage; first: the steps of the stages before it."""

    def batches(step: int) -> tuple[list[Window], int]:
        draw = Random(f"{settings['seed']}/{first + step}")
        passes = draw.choice(settings["passes"])
        start = (first + step) * settings["batch"]
        # Every seed has its own order of data, the same for all models.
        indices = [settings["seed"] << 40 | i for i in range(start, start + settings["batch"])]
        return batch_windows(task.batch("train", indices, settings["difficulty"]), kept), passes

    single = len(settings["variant"].get("stages", [{}])) == 1
    recipe = settings if single else {**settings, "stage": stage}
    return Trainer(
        model,
        folder,
        recipe,
        stage["steps"],
        batches,
        save_every=settings["evaluate"]["every"],
        **settings["trainer"],
    )


class Evaluation:
    """Accuracy on the valid split during training, appended to folder/evaluations.jsonl.

    tokens: of the stages before this one. after_step is called after every step.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        task: Task,
        model,
        kept: bool,
        tokens: int,
        after_step: Callable[[], None] | None,
    ):
        self.path = folder / EVALUATIONS
        self.settings, self.task, self.model = settings, task, model
        self.kept, self.tokens = kept, tokens
        self.after_step = after_step

    def on_step(self, row: dict) -> None:
        if row["step"] % self.settings["evaluate"]["every"] == 0:
            self._examine(row)
        if self.after_step:
            self.after_step()

    def _examine(self, row: dict) -> None:
        n = self.settings["evaluate"]["valid"]
        passes = max(self.settings["passes"])
        with open(self.path, "a") as file:
            for difficulty in self.settings["asked"]:
                scores = examine(self.model, self.task, "valid", n, difficulty, passes, self.kept)
                tokens = self.tokens + row["tokens"]
                new = {"difficulty": difficulty, "passes": passes, "tokens": tokens, **scores}
                file.write(json.dumps(new) + "\n")


def _beyond(settings: dict, task: Task, model, kept: bool) -> dict[str, list[dict]]:
    """The questions beyond the paper, for models that sleep with hard eviction."""
    beyond = settings["beyond"]
    asked = beyond.get("difficulty")
    if kept or model.sleep.eviction != "hard" or settings["difficulty"] not in (None, asked):
        return {"retention": [], "halting": []}
    n, most = beyond["examples"], max(settings["passes"])
    first = beyond.get("retention_difficulty", asked)
    rows = {"retention": list(retention(model, task, n, first, most, beyond["further"]))}
    rows["halting"] = []
    if len(settings["passes"]) > 1:  # a threshold is for a model that works at every N
        rows["halting"] += halting(model, task, n, asked, most, beyond["thresholds"])
    return rows


def main() -> None:
    parent = os.getppid()

    def after_step() -> None:
        if os.getppid() != parent:
            sys.exit("error: the study that started this run is gone")

    try:
        train(json.loads(sys.stdin.read()), Path(sys.argv[1]), after_step)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    keep_freed_memory()
    main()
