"""Draws the figures of the pages from docs/results/, for a light and for a dark background.

    python docs/scripts/figures.py           # writes docs/images/NAME-light.svg and NAME-dark.svg
    python docs/scripts/figures.py --check   # exit 1 where a file is not what the results give

Needs matplotlib.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tables import results

from mlx_sleep.lab.statistics import wilson
from mlx_sleep.lab.study import figures as study

DOCS = Path(__file__).resolve().parents[1]
THEMES = {
    "light": {"ink": "#1f2328", "dim": "#59636e", "line": "#d1d9e0"},
    "dark": {"ink": "#e6edf3", "dim": "#9198a1", "line": "#656c76"},
}
FONTS = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Helvetica, Arial, sans-serif"


def rule110() -> Figure:
    """t = 6 is of a plan of its own."""
    found, deep = (results(f"study_{name}")["study"] for name in ("rule110", "rule110_deep"))
    always = {**found["always"], **deep["always"]}
    return study.passes({**found, "rows": found["rows"] + deep["rows"], "always": always})


def recall() -> Figure:
    """Recall against the sleeps since a fact was told, with S kept and with S zeroed."""
    whole, *rows = results("recall_smollm2")["rows"]
    figure = Figure(figsize=(8.6, 3.4))
    axes = figure.subplots()
    for label, color, key, aside in (
        ("S kept", study.MORE_PASSES, "accuracy", -0.04),
        ("S zeroed", study.GREY, "zeroed", 0.04),
    ):
        x = np.arange(len(rows)) + aside
        y = np.array([row[key] for row in rows])
        low, high = np.transpose([wilson(row[key] * row["n"], row["n"]) for row in rows])
        errors = np.maximum(0, [y - low, high - y])
        style = {"marker": "o", "markersize": 5, "elinewidth": 1.2, "clip_on": False}
        axes.errorbar(x, y, yerr=errors, color=color, label=label, **style)
    ages = [row["case"].rpartition("age_")[2].replace("_", " to ") for row in rows]
    axes.set_xticks(
        range(len(rows)),
        [f"{age}\n(n = {row['n']})" for age, row in zip(ages, rows, strict=True)],
    )
    axes.set_xlim(-0.4, len(rows) - 0.6)
    study.in_percent(axes)
    axes.set_xlabel("sleeps since it was told")
    axes.set_ylabel("right answers (%)")
    figure.suptitle("SmolLM2: what is recalled after sleep", fontsize=11, fontweight="bold")
    axes.set_title(
        f"mlx-sleep eval memory --model smollm2 --case {whole['case']} --n {whole['n']}: "
        "20 facts over 16 windows, 95% intervals",
        fontsize=9,
    )
    axes.legend(loc="upper right")
    return figure


FIGURES: dict[str, Callable[[], Figure]] = {
    "recall": recall,
    "study-rule110": rule110,
    "study-depo": lambda: study.passes(results("study_depo")["study"]),
    "retention-rule110": lambda: study.retention(results("study_rule110")["study"]),
    "retention-depo": lambda: study.retention(results("study_depo")["study"]),
}


def svg(name: str, theme: str) -> str:
    """A figure's text, the same in every run of one version of matplotlib."""
    colors = THEMES[theme]
    style = {
        **study.STYLE,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.color": colors["ink"],
        "axes.labelcolor": colors["ink"],
        "axes.titlecolor": colors["ink"],
        "xtick.labelcolor": colors["dim"],
        "ytick.labelcolor": colors["dim"],
        "axes.edgecolor": colors["line"],
        "grid.color": colors["line"],
        "grid.alpha": 0.5,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "none",
    }
    file = io.StringIO()
    with matplotlib.rc_context(style):
        FIGURES[name]().savefig(file, format="svg", metadata={"Date": None})
    # Laid out in the font that comes with matplotlib, shown in the reader's.
    text = re.sub(r"(?<=font-family: )[^;\"]+", FONTS, file.getvalue())
    return re.sub(r"[ \t]+\n", "\n", text)


def main() -> None:
    stale = []
    for name in FIGURES:
        for theme in THEMES:
            path = DOCS / "images" / f"{name}-{theme}.svg"
            text = svg(name, theme)
            if "--check" not in sys.argv:
                path.write_text(text, encoding="utf-8")
            elif not path.is_file() or path.read_text(encoding="utf-8") != text:
                stale.append(f"docs/images/{path.name} is stale; run make figures")
    if stale:
        sys.exit("\n".join(stale))


if __name__ == "__main__":
    main()
