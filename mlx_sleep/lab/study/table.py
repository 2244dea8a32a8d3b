"""results.json and results.md: what the runs of a study found, difficulty by difficulty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...utils.atomic import replace_file
from ...utils.files import os_errors_as_user_errors
from ..statistics import wilson
from .plan import Run, read_model

COLUMNS = (
    "task",
    "size",
    "model",
    "difficulty",
    "passes",
    "seed",
    "tokens",
    "accuracy",
    "low",
    "high",
)


def collect(plan: dict, runs: Sequence[Run], results: dict[str, dict], extra: dict) -> dict:
    """The contents of results.json.

    rows       one for each run, difficulty and N, on the test set, with the keys COLUMNS; tokens
               are those of training, low and high the 95% Wilson interval
    curve      the same keys during training, on the valid set
    retention, halting   rows of `score`, with model and seed
    seconds    of training, by run
    and what `extra` has.
    """

    def rows(part: str):
        for run in runs:
            for row in results[run.name][part]:
                yield run, row

    def full(run: Run, row: dict) -> dict:
        all_of_it = {
            "task": plan["task"],
            "size": plan["size"],
            "model": run.model,
            "seed": run.seed,
            **row,
        }
        return {key: all_of_it[key] for key in COLUMNS}

    return {
        "task": plan["task"],
        "size": plan["size"],
        "test": plan["evaluate"]["test"],
        "rows": [full(run, row) for run, row in rows("rows")],
        "curve": [full(run, row) for run, row in rows("curve")],
        **{
            part: [{"model": run.model, "seed": run.seed, **row} for run, row in rows(part)]
            for part in ("retention", "halting")
        },
        "seconds": {run.name: results[run.name]["seconds"] for run in runs},
        **extra,
    }


def pooled(rows: Sequence[dict], keys: Sequence[str], n: int) -> list[dict]:
    """One row for each value of keys: accuracy over all seeds with the interval of all their
    examples (n a seed), and `seeds`, the accuracy of each one."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    result = []
    for values, group in groups.items():
        seeds = [row["accuracy"] for row in sorted(group, key=lambda row: row["seed"])]
        accuracy = sum(seeds) / len(seeds)
        low, high = wilson(accuracy * n * len(seeds), n * len(seeds))
        result.append(
            {
                **dict(zip(keys, values, strict=True)),
                "accuracy": accuracy,
                "low": low,
                "high": high,
                "seeds": seeds,
                **{key: _mean(group, key) for key in ("tokens", "mean_passes") if key in group[0]},
            }
        )
    return result


def _mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def markdown(found: dict, plan: dict) -> str:
    """results.md. An interval is that of the test examples of all seeds taken together; how far
    seeds differ is shown by giving each one."""
    lines = [f"# {found['task']}, size {found['size']}", ""]
    if plan.get("about"):
        lines += [plan["about"], ""]
    lines += [
        f"{found['test']} test examples for each difficulty; in brackets the 95% interval over the "
        "examples of all seeds, then each seed on its own. `always` is the best that one answer "
        "to everything gets.",
        f"Trained on: {found['device']}. "
        f"Time of training, all runs: {sum(found['seconds'].values()) / 60:.1f} process minutes.",
        "",
    ]
    what = {"rule110": "t", "depo": "hops", "gsm": "operations"}[found["task"]]
    groups = pooled(found["rows"], ("difficulty", "model", "passes"), found["test"])
    names = list(dict.fromkeys(row["model"] for row in found["rows"]))
    groups.sort(key=lambda row: (names.index(row["model"]), row["passes"]))
    for difficulty in sorted({row["difficulty"] for row in groups}):
        chance = found["always"].get(str(difficulty))
        lines += [
            f"## {what} = {difficulty}" + (f" (always: {chance:.1%})" if chance else ""),
            "",
            "| model | N | M tokens | accuracy | seeds |",
            "| --- | ---: | ---: | ---: | --- |",
        ]
        for row in groups:
            if row["difficulty"] == difficulty:
                lines.append(
                    f"| {row['model']} | {row['passes']} | {row['tokens'] / 1e6:.2f} | "
                    f"{_percent(row)} | {_seeds(row)} |"
                )
        lines.append("")
    if found["latency"]:
        lines += [
            "## A token of the answer, after sleep",
            "",
            "| model | N | ms a token | S bytes |",
            "| --- | ---: | ---: | ---: |",
            *(
                f"| {row['model']} | {row['passes'] or 'whole KV'} | {row['ms_per_token']:.2f} | "
                f"{row['state_bytes']:,} |"
                for row in found["latency"]
            ),
            "",
        ]
    n = plan["beyond"].get("examples", 0)
    keys = ("model", "difficulty", "passes", "further")
    if groups := pooled(found["retention"], keys, n):
        lines += [
            f"## The first window's questions, after further windows with sleep ({n} examples)",
            "",
            f"| model | {what} | N | further windows | accuracy | seeds |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            *(
                f"| {row['model']} | {row['difficulty']} | {row['passes']} | {row['further']} | "
                f"{_percent(row)} | {_seeds(row)} |"
                for row in groups
            ),
            "",
        ]
    if groups := pooled(found["halting"], ("model", "difficulty", "threshold"), n):
        lines += [
            f"## A sleep that ends when S moves less than a threshold ({n} examples)",
            "",
            f"| model | {what} | threshold | mean passes | accuracy | seeds |",
            "| --- | ---: | ---: | ---: | ---: | --- |",
            *(
                f"| {row['model']} | {row['difficulty']} | {row['threshold']} | "
                f"{row['mean_passes']:.2f} | {_percent(row)} | {_seeds(row)} |"
                for row in groups
            ),
            "",
        ]
    lines += ["## Models", "", *(f"- `{name}`: {read_model(name)['about']}" for name in names)]
    return "\n".join(lines) + "\n"


def _percent(row: dict) -> str:
    low, high = 100 * row["low"], 100 * row["high"]
    return f"{row['accuracy']:.1%} ({low:.0f} to {high:.0f})"


def _seeds(row: dict) -> str:
    return ", ".join(f"{100 * x:.1f}" for x in row["seeds"])


def write(out: Path, found: dict, plan: dict) -> None:
    """results.json and results.md in the study's folder, each whole or not at all."""
    with os_errors_as_user_errors(f"cannot write to {out}", "choose another --out"):
        text = json.dumps(found, indent=1, allow_nan=False) + "\n"
        replace_file(out / "results.json", text.encode())
        replace_file(out / "results.md", markdown(found, plan).encode())
