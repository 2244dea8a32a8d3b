"""Trains on the task `memory` by a recipe (training/recipe.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import mlx.core as mx
from mlx.utils import tree_flatten

from ..models.load import load_model
from ..models.sleep_hybrid import Model, ModelArgs
from ..training.recipe import choices, stage_of, total_steps
from ..training.trainer import Trainer
from ..training.windows import Window, labelled
from ..utils import schema
from ..utils.errors import UserError
from .tasks.memory import ASSISTANT, END, PAD, USER, Level, MemoryTask
from .windows import windows_of


def make_batches(
    recipe: dict, encode, specials: dict[str, int], split="train", rank=0, size=1
) -> Callable[[int], tuple[list[Window], int]]:
    """step -> (windows, passes) of this process's share of the batch; depends on the step alone."""
    task = MemoryTask(encode, specials, split, seed=recipe.get("seed", 0))
    batch = recipe["batch"] // size

    def batches(step: int) -> tuple[list[Window], int]:
        stage = stage_of(recipe, step)
        draw = Random(f"{recipe.get('seed', 0)}/{step}")
        passes = draw.choice(choices(stage["passes"]))
        level = {
            key: draw.choice(choices(v)) if key in ("windows", "asking") else v
            for key, v in stage["level"].items()
        }
        first = step * recipe["batch"] + rank * batch
        arrays = task.batch(range(first, first + batch), make_level(level))
        final = (arrays[f"final_{name}"] for name in ("tokens", "mask", "loss", "value"))
        return windows_of(arrays["tokens"], arrays["mask"], labelled(*final)), passes

    return batches


def make_level(values: dict) -> Level:
    return schema.read(Level, values, "level.", closed=True)


def make_trainer(
    recipe: dict,
    folder: Path,
    tokenizer_folder: Path,
    *,
    start: str | Path | None = None,
    checkpoint_passes: bool = False,
    save_every: int = 200,
) -> Trainer:
    """A trainer for the recipe. `start` is a model folder to begin from (fresh optimizer)."""
    group = mx.distributed.init()
    if recipe["batch"] % group.size():
        raise UserError(f"batch {recipe['batch']} cannot be split over {group.size()} processes")
    encode, _, specials = sentencepiece_encoder(tokenizer_folder)
    mx.random.seed(recipe.get("seed", 0))
    model = Model(ModelArgs.from_dict(recipe["model"]))
    if start is not None:
        weights = tree_flatten(load_model(start)[0].parameters())
        try:
            model.load_weights(weights)  # type: ignore[arg-type]  # a list, without destination
        except ValueError as e:
            raise UserError(f"{start} does not fit the recipe's model: {e}") from None
    batches = make_batches(recipe, encode, specials, rank=group.rank(), size=group.size())
    return Trainer(
        model,
        folder,
        {**recipe, "start": start and str(start)},
        total_steps(recipe),
        batches,
        checkpoint_passes=checkpoint_passes,
        save_every=save_every,
        group=group,
        **recipe["optimizer"],
    )


def sentencepiece_encoder(folder: Path):
    """(encode, decode, specials) from tokenizer.model alone, which loads fast."""
    from sentencepiece import SentencePieceProcessor

    path = Path(folder).expanduser() / "tokenizer.model"
    if not path.exists():
        raise UserError(
            f"no tokenizer at {path}; make one: python -m mlx_sleep.lab.tasks.tokenizer DIR"
        )
    try:
        sp = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError):
        raise UserError(f"{path} is not a sentencepiece model; download it again") from None
    specials = {name: sp.piece_to_id(name) for name in (USER, ASSISTANT, END, PAD)}
    if missing := [name for name, i in specials.items() if i == sp.unk_id()]:
        raise UserError(
            f"{path} has no {', '.join(missing)}: the task needs a model that was trained on it"
        )
    return sp.encode, sp.decode, specials
