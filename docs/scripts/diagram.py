"""Draws docs/images/sleep-light.svg and sleep-dark.svg: awake, asleep, awake again.

python docs/scripts/diagram.py
"""

from __future__ import annotations

from pathlib import Path

IMAGES = Path(__file__).resolve().parents[1] / "images"
WIDTH, HEIGHT = 880, 262
THEMES = {
    "light": {
        "ink": "#1f2328",
        "dim": "#59636e",
        "line": "#8c959f",
        "kv": "#54aeff",
        "S": "#8250df",
    },
    "dark": {
        "ink": "#e6edf3",
        "dim": "#9198a1",
        "line": "#656c76",
        "kv": "#388bfd",
        "S": "#a371f7",
    },
}
PANEL, GAP = 232, 92
TITLES = "awake", "asleep", "awake again"
CAPTIONS = (
    ("recent tokens in the KV cache,", "older context in S"),
    ("N passes over the window", "fold it into S"),
    ("an empty KV cache;", "one forward pass a token"),
)


def text(x: float, y: float, words: str, colour: str, size: int = 13, weight: int = 400) -> str:
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="middle">{words}</text>'
    )


def cells(x: float, y: float, filled: int, colours: dict) -> str:
    """A KV cache with room for eight tokens."""
    return "".join(
        f'<rect x="{x + 24 * i}" y="{y}" width="20" height="20" rx="3" '
        + (
            f'fill="{colours["kv"]}"/>'
            if i < filled
            else f'fill="none" stroke="{colours["line"]}" stroke-dasharray="3 3"/>'
        )
        for i in range(8)
    )


def fast_weights(x: float, y: float, shades: int, colours: dict) -> str:
    """S as a grid; the more it holds, the stronger."""
    squares = []
    for row in range(4):
        for column in range(8):
            opacity = 0.14 + 0.86 * ((7 * row + 5 * column) % 11 / 10) * shades / 10
            squares.append(
                f'<rect x="{x + 14 * column}" y="{y + 14 * row}" width="12" height="12" rx="2" '
                f'fill="{colours["S"]}" opacity="{opacity:.2f}"/>'
            )
    return "".join(squares)


def arrow(x: float, y: float, length: float, colour: str) -> str:
    return (
        f'<path d="M{x} {y}h{length}m-7 -5l7 5l-7 5" fill="none" stroke="{colour}" '
        'stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"/>'
    )


def draw(theme: str) -> str:
    c = THEMES[theme]
    parts = []
    for i, (title, caption) in enumerate(zip(TITLES, CAPTIONS, strict=True)):
        x = i * (PANEL + GAP)
        middle = x + PANEL / 2
        parts.append(
            f'<rect x="{x + 1}" y="33" width="{PANEL - 2}" height="170" rx="10" fill="none" '
            f'stroke="{c["line"]}"/>'
        )
        parts.append(text(middle, 22, title, c["ink"], 16, 600))
        parts.append(cells(x + 22, 64, (7, 8, 2)[i], c))
        parts.append(fast_weights(x + 60, 132, (3, 6, 9)[i], c))
        parts.append(text(x + 36, 55, "KV", c["dim"], 11))
        parts.append(text(x + 42, 166, "S", c["dim"], 13, 600))
        for line, words in enumerate(caption):
            parts.append(text(middle, 224 + 18 * line, words, c["ink"]))
    left = PANEL + GAP + PANEL / 2  # the passes: down into S, round N times
    for shift in (-26, 0, 26):
        parts.append(
            f'<path d="M{left + shift} 90v30m-5 -7l5 7l5 -7" fill="none" stroke="{c["S"]}" '
            'stroke-width="1.6" stroke-linecap="round" stroke-linejoin="round"/>'
        )
    parts.append(text(left + 66, 112, "N times", c["dim"], 12))
    for i, (first, second) in enumerate((("window full,", "or you idle"), ("KV cache", "cleared"))):
        x = (i + 1) * PANEL + i * GAP
        parts.append(arrow(x + 12, 118, GAP - 24, c["line"]))
        parts.append(text(x + GAP / 2, 92, first, c["dim"], 12))
        parts.append(text(x + GAP / 2, 107, second, c["dim"], 12))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="-apple-system, BlinkMacSystemFont, Segoe UI, Helvetica, Arial, sans-serif">'
        "<title>Awake, asleep, awake again</title>" + "".join(parts) + "</svg>\n"
    )


if __name__ == "__main__":
    for theme in THEMES:
        (IMAGES / f"sleep-{theme}.svg").write_text(draw(theme), encoding="utf-8")
