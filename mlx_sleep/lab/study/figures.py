"""The two figures of the paper and two beyond it, from the contents of results.json."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...utils.errors import UserError
from ...utils.files import os_errors_as_user_errors
from ...utils.pip import pip_install
from .table import pooled

WHAT = {"rule110": "t", "depo": "hops", "gsm": "operations"}


def check() -> None:
    """UserError when matplotlib is missing: asked for before the training, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            f"figures need matplotlib: {pip_install('mlx-sleep[plot]')}, or leave out --figures"
        ) from None


def draw(found: dict, out: Path, examples: int) -> list[Path]:
    """Writes the figures that the results have rows for; their paths. examples: of retention."""
    from matplotlib.figure import Figure

    paths = []
    for name, panels, plot in (
        ("passes", None, _passes),
        ("tokens", _difficulties(found["curve"]), _tokens),
        ("retention", None, _retention),
        ("halting", None, _halting),
    ):
        rows = found["rows"] if name == "passes" else found["curve" if panels else name]
        if not rows:
            continue
        difficulties: list[int | None] = [*panels] if panels else [None]
        count = len(difficulties)
        figure = Figure(figsize=(max(6, 4 * count), 4.2), layout="constrained")
        axes = figure.subplots(1, count, sharey=True, squeeze=False)[0]
        for one, difficulty in zip(axes, difficulties, strict=True):
            plot(found, one, difficulty, examples)
            one.set_ylim(0, 1.02)
            one.grid(alpha=0.3)
        axes[0].set_ylabel("accuracy")
        axes[-1].legend(fontsize="small")
        path = out / f"{name}.png"
        with os_errors_as_user_errors(f"cannot write {path}", "choose another --out"):
            figure.savefig(path, dpi=150)
        paths.append(path)
    return paths


def _difficulties(rows: list[dict]) -> list[int]:
    return sorted({row["difficulty"] for row in rows})


def _line(axes, x: list, rows: list[dict], label: str, **style) -> None:
    y = [row["accuracy"] for row in rows]
    # By rounding, the end of an interval may lie on the wrong side of the point.
    errors = [
        [max(0.0, row["accuracy"] - row["low"]) for row in rows],
        [max(0.0, row["high"] - row["accuracy"]) for row in rows],
    ]
    axes.errorbar(x, y, yerr=errors, capsize=3, label=label, **{"marker": "o", **style})


def _passes(found, axes, _difficulty, _examples):
    """Accuracy against N, a line for each difficulty; at N = 1 also the models that spend the FLOPs
    of N = 4 in another way."""
    groups = pooled(found["rows"], ("model", "difficulty", "passes"), found["test"])
    for i, difficulty in enumerate(_difficulties(found["rows"])):
        # Those of N = 1 are drawn side by side.
        for model, words, aside, style in (
            ("hybrid", "", 0, {"marker": "o"}),
            ("random_passes", ", N drawn", 0, {"linestyle": "--", "alpha": 0.6}),
            ("hybrid_flops", ", FLOPs of N = 4", -0.1, {"marker": "s", "linestyle": ""}),
            ("looped", ", 4 times as deep", 0.1, {"marker": "^", "linestyle": ""}),
        ):
            line = [r for r in groups if r["model"] == model and r["difficulty"] == difficulty]
            if line:
                line.sort(key=lambda row: row["passes"])
                label = f"{WHAT[found['task']]} = {difficulty}{words}"
                _line(
                    axes, [r["passes"] + aside for r in line], line, label, color=f"C{i}", **style
                )
    axes.set_xlabel("passes N")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _tokens(found, axes, difficulty, _examples):
    """Accuracy on the valid set against training tokens, a line for each N; means over seeds."""
    rows = [r for r in found["curve"] if r["difficulty"] == difficulty and r["model"] == "hybrid"]
    for passes in sorted({row["passes"] for row in rows}):
        # An N has its colour in every panel, also where other N are missing.
        color = f"C{passes - 1}"
        tokens, accuracies = _curve([row for row in rows if row["passes"] == passes])
        x = [np.mean(one) / 1e6 for one in tokens]
        y = [np.mean(one) for one in accuracies]
        axes.plot(x, y, color=color, label=f"N = {passes}")
        low, high = ([f(one) for one in accuracies] for f in (min, max))
        axes.fill_between(x, low, high, color=color, alpha=0.15)
    axes.set_title(f"{WHAT[found['task']]} = {difficulty}", fontsize="medium")
    axes.set_xlabel("million training tokens")


def _curve(rows: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """(tokens, accuracies) of all seeds for each examination, as far as every seed has it.

    Seeds are examined after the same steps, which differ in tokens where contexts are padded.
    """
    seeds: dict = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        seeds.setdefault(row["seed"], []).append(row)
    times = list(zip(*seeds.values(), strict=False))
    tokens, accuracies = (
        [tuple(row[key] for row in rows) for rows in times] for key in ("tokens", "accuracy")
    )
    return tokens, accuracies


def _retention(found, axes, _difficulty, examples):
    rows = [row for row in found["retention"] if row["model"] == "hybrid"]
    groups = pooled(rows, ("passes", "further"), examples)
    for passes in sorted({row["passes"] for row in groups}):
        line = [row for row in groups if row["passes"] == passes]
        _line(axes, [row["further"] for row in line], line, f"N = {passes}")
    counts = sorted({row["further"] for row in groups})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("further windows slept over")


def _halting(found, axes, _difficulty, examples):
    groups = pooled(found["halting"], ("difficulty", "threshold"), examples)
    for difficulty in _difficulties(groups):
        line = [row for row in groups if row["difficulty"] == difficulty]
        line.sort(key=lambda row: row["mean_passes"])
        label = f"{WHAT[found['task']]} = {difficulty}"
        _line(axes, [row["mean_passes"] for row in line], line, label)
    axes.set_xlabel("mean passes of a sleep")
