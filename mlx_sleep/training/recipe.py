"""Recipes: JSON files that say everything about a training run, and how to read one.

    {"task": "memory", "seed": 0, "batch": 64,
     "model": {... config.json of the model ...},
     "optimizer": {"muon_lr": 0.01, "adamw_lr": 0.002, "warmup": 100, "cooldown": 0.3},
     "stages": [{"steps": 500, "passes": 1, "level": {"windows": 1, "facts": [2, 4], ...}}, ...]}

`passes`, and `windows` in a level, may be lists: each step then draws one of them. A stage's levels
are the task's own (`lab.tasks.memory.Level`).
"""

from __future__ import annotations

from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import read_json

RECIPES = Path(__file__).parent / "recipes"
TASKS = ("memory",)


def read_recipe(name: str) -> dict:
    """A recipe by its path, or by the name of one inside the package."""
    path = Path(name) if Path(name).suffix == ".json" else RECIPES / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.json")))
        raise UserError(f"no recipe {name!r}; give a .json file or one of: {known}")
    recipe = read_json(path)
    for key in ("task", "batch", "model", "optimizer", "stages"):
        if key not in recipe:
            raise UserError(f"{path} lacks {key!r}")
    if recipe["task"] not in TASKS:
        raise UserError(f"unknown task {recipe['task']!r}; known: {', '.join(TASKS)}")
    if any(n < 1 for stage in recipe["stages"] for n in choices(stage["passes"])):
        raise UserError(f"{path}: a sleep needs at least 1 pass")
    return recipe


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
