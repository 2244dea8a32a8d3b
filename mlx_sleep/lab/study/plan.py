"""Plans: JSON files that name every run of a study, and what they say for each one.

    {"task": "rule110", "size": "tiny", "about": "...",
     "world": {"width": 10, "strings": 3},                     arguments of the task
     "difficulties": [1, 4],                                   what the test set asks
     "model": {"hidden_size": 64, "blocks": 4, ...},           config.json but for the layers
     "batch": 128, "steps": 300, "trainer": {...},             arguments of `training.Trainer`
     "evaluate": {"every": 50, "valid": 256, "test": 1000},    steps, and examples a difficulty
     "beyond": {"difficulty": 4, "examples": 250,              what else trained models are asked
                "thresholds": [0.1, 0.3], "further": [1, 2]},
     "runs": [{"model": "hybrid", "passes": [1, 2], "difficulties": [4], "seeds": [0, 1]}]}

A model (configs/models/NAME.json) has a pattern of layers, repeated over the blocks, and what sets
it apart: `context` "evicted" or "kept" (never slept over), `deeper` (so many times the blocks),
`loops` (how often the blocks are run in every forward pass), `train_passes` (N drawn for each
step), `flops_of_passes` (as many steps as cost what N passes would), `stages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from ...utils import schema
from ...utils.errors import UserError
from ...utils.files import read_json
from ...utils.schema import Range
from ..tasks.synthetic import check_int
from .task import Task

CONFIGS = Path(__file__).parent / "configs"
TASKS = ("rule110", "depo", "gsm")


@dataclass
class Entry:
    """Some runs of a plan: one of each of these."""

    model: str
    passes: list[Annotated[int, Range(1)]] = field(default_factory=lambda: [1])
    difficulties: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    steps: Annotated[int, Range(1)] | None = None


@dataclass
class Evaluate:
    """Steps between evaluations, and examples for each difficulty."""

    every: Annotated[int, Range(1)]
    valid: Annotated[int, Range(1)]
    test: Annotated[int, Range(1)]


@dataclass
class Beyond:
    """What else trained models are asked."""

    examples: Annotated[int, Range(1)] | None = None
    difficulty: int | None = None
    thresholds: list[float] = field(default_factory=list)
    further: list[int] = field(default_factory=list)


@dataclass
class Plan:
    """The fields of a plan."""

    task: str
    size: str
    world: dict
    difficulties: list[int]
    model: dict
    trainer: dict
    batch: Annotated[int, Range(1)]
    steps: Annotated[int, Range(1)]
    evaluate: Evaluate
    beyond: Beyond
    runs: list[Entry]


@dataclass(frozen=True)
class Run:
    """One model to be trained. settings is JSON, says everything, and is compared on resume.

    difficulty is None for a task whose models are trained on all of them.
    """

    name: str
    model: str
    passes: tuple[int, ...]
    difficulty: int | None
    seed: int
    settings: dict


def sizes(task: str) -> list[str]:
    """The plans of a task that the package has."""
    return sorted(path.stem.partition("_")[2] for path in CONFIGS.glob(f"{task}_*.json"))


def read_plan(task: str, size: str) -> dict:
    """The plan of a task at a size, or the .json file that `size` names. UserError says why not."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    own = Path(size).suffix == ".json"
    if not own and size not in sizes(task):
        raise UserError(f"unknown size {size!r}; one of {', '.join(sizes(task))}, or a .json file")
    path = Path(size) if own else CONFIGS / f"{task}_{size}.json"
    plan = read_json(path)
    with schema.naming(path):
        schema.read(Plan, plan)
        if plan["task"] != task:
            raise UserError(f"it is a plan for the task {plan['task']!r}, not {task!r}")
        check_int("model.blocks", plan["model"].get("blocks"), 1)
    return plan


def read_model(name: str) -> dict:
    """What sets a model of the study apart."""
    path = CONFIGS / "models" / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.json")))
        raise UserError(f"unknown model {name!r}; known: {known}")
    return read_json(path)


def make_runs(
    plan: dict,
    task: Task,
    models: Sequence[str] | None = None,
    passes: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """The runs of a plan, the headline's first; models, passes and seeds pick some of them.

    task is the object that makes the plan's data. UserError for what the plan doesn't have.
    """
    runs: list[Run] = []
    for entry in plan["runs"]:
        runs += _runs_of(plan, task, entry)
    if len({run.name for run in runs}) < len(runs):
        raise UserError("the plan has the same run twice")
    _refuse("model", models, [run.model for run in runs])
    _refuse("passes", passes, [n for run in runs for n in run.passes])
    _refuse("seed", seeds, [run.seed for run in runs])
    chosen = [
        run
        for run in runs
        if (models is None or run.model in models)
        and (passes is None or set(run.passes) & set(passes))
        and (seeds is None or run.seed in seeds)
    ]
    if not chosen:
        raise UserError("the plan has no run of these models, passes and seeds together")
    return chosen


def _refuse(what: str, wanted: Sequence | None, known: Sequence) -> None:
    for value in wanted or ():
        if value not in known:
            names = ", ".join(map(str, sorted(set(known))))
            raise UserError(f"the plan has no run with {what} {value}; it has: {names}")


def _runs_of(plan: dict, task: Task, entry: dict) -> list[Run]:
    schema.check(Entry, entry, "run")
    model = read_model(entry["model"])
    if "train_passes" in model:
        passes = [tuple(model["train_passes"])]
    else:
        passes = [(check_int("passes", n, 1),) for n in entry.get("passes", [1])]
    difficulties = entry.get("difficulties", plan["difficulties"]) if task.trained_apart else [None]
    runs = []
    for difficulty in difficulties:
        task.check(difficulty)
        for train_passes in passes:
            for seed in entry.get("seeds", [0]):
                name = entry["model"] + ("" if difficulty is None else f"-d{difficulty}")
                name += (
                    f"-n{train_passes[0]}"
                    if len(train_passes) == 1
                    else f"-n{train_passes[0]}to{train_passes[-1]}"
                )
                asked = plan["difficulties"] if difficulty is None else [difficulty]
                steps = check_int("steps", entry.get("steps", plan["steps"]), 1)
                settings = {
                    "task": plan["task"],
                    "world": plan["world"],
                    "difficulty": difficulty,
                    "asked": asked,
                    "model": plan["model"],
                    "variant": {key: x for key, x in model.items() if key != "about"},
                    "passes": list(train_passes),
                    "seed": seed,
                    "batch": plan["batch"],
                    "steps": _matched(steps, model, task),
                    "trainer": plan["trainer"],
                    "evaluate": plan["evaluate"],
                    "beyond": plan["beyond"],
                }
                name = f"{name}-s{seed}"
                runs.append(Run(name, entry["model"], train_passes, difficulty, seed, settings))
    return runs


def _matched(steps: int, model: dict, task: Task) -> int:
    """Steps with one pass that cost the training FLOPs of `steps` with `flops_of_passes`.

    Blocks cost the same for each token that passes through them, and the rest next to nothing.
    """
    if "flops_of_passes" not in model:
        return steps
    slept, answered = task.windows * task.window, task.final_tokens
    cost = (model["flops_of_passes"] * slept + answered) / (slept + answered)
    return round(steps * cost)
