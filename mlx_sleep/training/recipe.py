"""Recipes: JSON files that say everything about a training run, and how to read one.

    {"task": "memory", "seed": 0, "batch": 64,
     "model": {... config.json of the model ...},
     "optimizer": {"muon_lr": 0.01, "adamw_lr": 0.002, "warmup": 100, "cooldown": 0.3},
     "stages": [{"steps": 500, "passes": 1, "level": {"windows": 1, "facts": [2, 4], ...}}, ...]}

`passes`, and `windows` and `asking` in a level, may be lists: each step then draws one of each. A
stage's levels are the task's own (`lab.tasks.memory.Level`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import read_json
from ..utils.schema import Positive, Range

RECIPES = Path(__file__).parent / "recipes"
TASKS = ("memory",)


def read_recipe(name: str) -> dict:
    """A recipe by its path, or by the name of one inside the package."""
    path = Path(name) if Path(name).suffix == ".json" else RECIPES / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.json")))
        raise UserError(f"no recipe {name!r}; give a .json file or one of: {known}")
    values = read_json(path)
    with schema.naming(path):
        recipe = schema.read(Recipe, values)
        if recipe.task not in TASKS:
            raise UserError(f"unknown task {recipe.task!r}; known: {', '.join(TASKS)}")
        schema.read(Optimizer, recipe.optimizer, "optimizer.", closed=True)
        for i, stage in enumerate(recipe.stages):
            if any(n < 1 for n in choices(stage.passes)):
                raise UserError(f"stages[{i}].passes: a sleep needs at least 1 pass")
    return values


@dataclass
class Stage:
    """A stage of a recipe's curriculum."""

    steps: Annotated[int, Range(1)]
    passes: int | Annotated[list[int], Range(1)]
    level: dict


@dataclass
class Recipe:
    """The fields of a recipe; the model is read by its architecture."""

    task: str
    batch: Annotated[int, Range(1)]
    model: dict
    optimizer: dict
    stages: Annotated[list[Stage], Range(1)]
    seed: int = 0


@dataclass
class Optimizer:
    """Arguments of `Trainer`."""

    muon_lr: Annotated[float, Range(0)] = 2e-3
    adamw_lr: Annotated[float, Range(0)] = 1e-3
    weight_decay: Annotated[float, Range(0)] = 0.0
    warmup: Annotated[int, Range(0)] = 100
    cooldown: Annotated[float, Range(0)] = 0.3
    clip: Positive = 1.0


def total_steps(recipe: dict) -> int:
    return sum(stage["steps"] for stage in recipe["stages"])


def choices(value) -> list:
    return value if isinstance(value, list) else [value]


def stage_of(recipe: dict, step: int) -> dict:
    for stage in recipe["stages"]:
        if step < stage["steps"]:
            return stage
        step -= stage["steps"]
    return recipe["stages"][-1]
