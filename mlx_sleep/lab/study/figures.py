"""Figures of a study, from the contents of results.json.

A seed is a light point, the mean over seeds a line; no interval is drawn over seeds, which may lie
far apart. A chart of fewer than three places along its axis is not drawn: the tables say it better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from ...utils.errors import UserError
from ...utils.files import os_errors_as_user_errors
from ...utils.pip import pip_install

STYLE = {
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.06,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
"""matplotlib's rcParams, but for what a background decides."""
PASSES = {1: "#d9730d", 2: "#12a594", 3: "#3b82f6"}
MORE_PASSES = "#8b5cf6"
GREY = "#8b949e"
TASKS = {"rule110": "Rule 110", "depo": "Depo", "gsm": "GSM"}

Place = Sequence[tuple[float, float]]
"""(x, y) of each seed."""


def check() -> None:
    """UserError when matplotlib is missing: asked for before the training, not after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UserError(
            f"figures need matplotlib: {pip_install('mlx-sleep[plot]')}, or leave out --figures"
        ) from None


def draw(found: dict, out: Path) -> list[Path]:
    """Writes passes.png, tokens.png and retention.png, as far as the results show something; their
    paths."""
    import matplotlib

    paths = []
    with matplotlib.rc_context(STYLE):
        for name, plot in (("passes", passes), ("tokens", tokens), ("retention", retention)):
            figure = plot(found)
            if figure is None:
                continue
            path = out / f"{name}.png"
            with os_errors_as_user_errors(f"cannot write {path}", "choose another --out"):
                figure.savefig(path, dpi=150)
            paths.append(path)
    return paths


def passes(found: dict):
    """Accuracy against N, a panel for each difficulty; at N = 1 also the models that spend the
    FLOPs of N = 4 in another way. None without a difficulty that has three N."""
    rows = found["rows"]
    shown = [
        d for d in _values(rows, "difficulty") if len(_values(_of(rows, "hybrid", d), "passes")) > 2
    ]
    if not shown:
        return None
    figure, panels = _panels(found, shown, "accuracy against the passes of a sleep")
    for difficulty, axes in zip(shown, panels, strict=True):
        for model, words, color, marker, aside in (
            ("hybrid", "mean over seeds", MORE_PASSES, "o", 0.0),
            ("hybrid_flops", "N = 1, training FLOPs of N = 4", PASSES[1], "s", -0.24),
            ("looped", "N = 1, four times as deep", PASSES[2], "^", 0.24),
        ):
            groups = _places(_of(rows, model, difficulty), "passes", aside)
            _line(axes, groups, words, color, marker)
        _guessing(axes, found, difficulty)
        axes.set_xlabel("passes N of a sleep")
        counts = _values(rows, "passes", lambda row: row["model"] == "hybrid")
        axes.set_xticks(counts)
        axes.set_xlim(counts[0] - 0.5, counts[-1] + 0.3)
    return _finish(figure, panels)


def tokens(found: dict):
    """Accuracy on the valid set against training tokens, a line for each N; None without three
    examinations."""
    rows = [row for row in found.get("curve", ()) if row["model"] == "hybrid"]
    if len(_values(rows, "tokens")) < 3:
        return None
    shown = _values(rows, "difficulty")
    figure, panels = _panels(found, shown, "accuracy while training")
    for difficulty, axes in zip(shown, panels, strict=True):
        for N in _values(rows, "passes"):
            of_N = [row for row in _of(rows, "hybrid", difficulty) if row["passes"] == N]
            color = PASSES.get(N, MORE_PASSES)
            _line(axes, _examinations(of_N), f"N = {N}, mean over seeds", color, size=8)
        _guessing(axes, found, difficulty)
        axes.set_xlabel("training tokens (millions)")
    return _finish(figure, panels)


def retention(found: dict):
    """What is left of the first window after further windows with sleep, a panel for each N; None
    without three counts of further windows."""
    rows = [row for row in found["retention"] if row["model"] == "hybrid"]
    counts = _values(rows, "further")
    if len(counts) < 3:
        return None
    shown = _values(rows, "passes")
    what = _difficulty(found, rows[0]["difficulty"])
    title = f"what is left of the first window ({what})"
    figure, panels = _panels(found, shown, title, lambda found, N: f"N = {N}")
    nothing = [row for row in found["retention"] if row["model"] == "transformer"]
    for N, axes in zip(shown, panels, strict=True):
        of_N = [row for row in rows if row["passes"] == N]
        _line(axes, _places(of_N, "further"), "mean over seeds", MORE_PASSES)
        if nothing:
            level = [np.mean([y for _, y in place]) for place in _places(nothing, "further")]
            axes.plot(counts, level, color=GREY, linestyle="--", linewidth=1, label="without S")
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("further windows slept over")
    return _finish(figure, panels)


def in_percent(axes) -> None:
    """Axes whose y are shares, from 0 to 1."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.tick_params(length=0)


def _values(rows: Iterable[dict], key: str, where: Callable[[dict], bool] = bool) -> list[int]:
    return sorted({row[key] for row in rows if where(row)})


def _of(rows: Iterable[dict], model: str, difficulty: int) -> list[dict]:
    return [row for row in rows if row["model"] == model and row["difficulty"] == difficulty]


def _difficulty(found: dict, value: int) -> str:
    if found["task"] == "rule110":
        return f"t = {value}"
    what = {"depo": "hop", "gsm": "operation"}[found["task"]]
    return f"{value} {what}{'s' * (value != 1)}"


def _places(rows: Sequence[dict], key: str, aside: float = 0.0) -> list[Place]:
    """The seeds at each value of `key`, side by side where there are several."""
    places: list[Place] = []
    for value in _values(rows, key):
        of_value = sorted((r for r in rows if r[key] == value), key=lambda row: row["seed"])
        middle = (len(of_value) - 1) / 2
        spread = 0.07 if key == "passes" else 0.0
        places.append(
            [
                (value + aside + spread * (i - middle), row["accuracy"])
                for i, row in enumerate(of_value)
            ]
        )
    return places


def _examinations(rows: Sequence[dict]) -> list[Place]:
    """The seeds at each examination, as far as every seed has it, in millions of tokens.

    Seeds are examined after the same steps, which differ in tokens where contexts are padded.
    """
    seeds: dict[int, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        seeds.setdefault(row["seed"], []).append(row)
    return [
        [(row["tokens"] / 1e6, row["accuracy"]) for row in of_all]
        for of_all in zip(*seeds.values(), strict=False)
    ]


def _line(axes, places: Sequence[Place], label: str, color: str, marker="o", size=20) -> None:
    """The mean of each place's seeds as a line, over the seeds as light points."""
    if not places:
        return
    seeds = np.array([point for place in places for point in place])
    axes.scatter(
        *seeds.T, s=size, marker=marker, color=color, alpha=0.6, linewidth=0, clip_on=False
    )
    means = np.array([np.mean(place, axis=0) for place in places])
    alone = {"marker": marker, "markersize": 6, "linestyle": "", "fillstyle": "none"}
    style = alone if len(places) == 1 else {}  # a line through one place is not seen
    axes.plot(*means.T, color=color, label=label, clip_on=False, **style)


def _guessing(axes, found: dict, difficulty: int) -> None:
    """What one answer to everything gets."""
    if level := found["always"].get(str(difficulty)):
        axes.axhline(level, color=GREY, linestyle="--", linewidth=1, label="guessing")


def _panels(found: dict, values: Sequence[int], title: str, name: Callable = _difficulty):
    """(figure, its axes side by side, one for each value), with titles."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.6, min(8.8, 2.9 * len(values))), 3.4))
    panels = figure.subplots(1, len(values), sharey=True, squeeze=False)[0]
    for value, axes in zip(values, panels, strict=True):
        axes.set_title(name(found, value))
        in_percent(axes)
    panels[0].set_ylabel("accuracy (%)")
    figure.suptitle(f"{TASKS[found['task']]}: {title}", fontsize=11, fontweight="bold")
    return figure, panels


def _finish(figure, panels):
    """The figure with one legend for all its panels."""
    from matplotlib.lines import Line2D

    known = {}
    for axes in panels:
        known.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    seed = Line2D([], [], marker="o", color=GREY, alpha=0.5, linestyle="", markeredgewidth=0)
    handles, labels = [seed, *known.values()], ["a seed", *known]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure
