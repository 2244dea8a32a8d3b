"""Draws a recording as one SVG that plays by itself, in a loop: CSS keyframes, no script.

What a terminal shows is mostly a log whose lines stand once they are written, so that three
things move, whatever the length:

    log     all lines, one below the other: it scrolls
    cover   hides the lines of the log that are not written yet
    strip   what is being written, a frame beside the other: a line that is typed, a status

Where nothing may move (prefers-reduced-motion), and in programs that know no animations, the last
frame stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import NamedTuple

from .cast import Cast
from .screen import Frame, Row, Style, frames, transcript

COLUMN, LINE, SIZE = 8.4, 19, 14  # of a cell, and of its font
BAR, PADDING = 34, 14  # the window's title bar, and what is round the text
HOLD = 5.0
"""Seconds that the last frame stands before the first comes again."""
NEWLINE = "\n"  # Python before 3.12 has no backslash in an f-string's braces
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"

NAMES = "black red green brown blue magenta cyan white".split()  # pyte calls yellow brown
THEMES: dict[str, tuple[list[str], ...]] = {
    # GitHub's: ink, paper, title bar, lines; the eight colours; their bright forms
    "light": (
        "#1f2328 #ffffff #f6f8fa #d1d9e0".split(),
        "#24292f #cf222e #116329 #9a6700 #0969da #8250df #1b7c83 #6e7781".split(),
        "#59636e #a40e26 #1a7f37 #bf8700 #218bff #a475f9 #3192aa #8c959f".split(),
    ),
    "dark": (
        "#e6edf3 #0d1117 #161b22 #3d444d".split(),
        "#484f58 #ff7b72 #3fb950 #d29922 #58a6ff #bc8cff #39c5cf #b1bac4".split(),
        "#8b949e #ffa198 #56d364 #e3b341 #79c0ff #d2a8ff #56d4dd #ffffff".split(),
    ),
}


def number(x: float) -> str:
    """As an attribute has it: cells are whole tenths wide."""
    return f"{x:.1f}".removesuffix(".0")


class Run(NamedTuple):
    """Neighbouring cells of one style. A wide character is one of its own."""

    column: int
    width: int
    text: str
    style: Style


def runs(row: Row) -> list[Run]:
    made: list[Run] = []
    for column, (text, width, style) in sorted(row.items()):
        last = made[-1] if made else None
        if last and last.style == style and last.width == len(last.text) and width == len(text):
            made[-1] = last._replace(width=last.width + 1, text=last.text + text)
        else:
            made.append(Run(column, width, text, style))
    return made


def written(shown: list[Frame]) -> tuple[list[int], list[Row]]:
    """For each frame how many lines, from the first, stay as they are from it on; and all lines.

    A line that has scrolled away stays as it was.
    """
    lines: dict[int, Row] = {}
    changed: dict[int, int] = {}
    for i, frame in enumerate(shown):
        for row, cells in frame.rows.items():
            if lines.get(row) != cells:
                lines[row], changed[row] = cells, i
    total = max(lines) + 1
    counts, count = [], 0
    for i in range(len(shown)):
        while count < total and changed.get(count, 0) <= i:
            count += 1
        counts.append(count)
    return counts, [lines.get(row, {}) for row in range(total)]


def draw(cast: Cast, theme: str) -> str:
    """The SVG. theme is a key of THEMES."""
    shown = list(frames(cast))
    counts, lines = written(shown)
    canvas = _Canvas(theme)
    log = [shape for y, row in enumerate(lines) for shape in canvas.row(row, y)]
    strip = _Strip(canvas, cast.columns)
    times = [frame.time for frame in shown]
    length = times[-1] + HOLD
    shifts = [strip.add(frame, count) for frame, count in zip(shown, counts, strict=True)]
    places = {
        "log": [f"0,{-LINE * frame.top}px" for frame in shown],
        "cover": [f"0,{LINE * count}px" for count in counts],
        "strip": [f"{number(shift)}px,0" for shift in shifts],
    }
    still = {  # an attribute, for programs that know no CSS; an animation is stronger
        name: f'id="{name}" transform="translate({place[-1].replace("px", "")})"'
        for name, place in places.items()
    }
    keyframes = NEWLINE.join(
        f"@keyframes {name}{{{_keyframes(times, place, length)}}}\n#{name}{{animation-name:{name}}}"
        for name, place in places.items()
    )
    width = round(cast.columns * COLUMN + 2 * PADDING)
    inside = cast.rows * LINE
    height = BAR + inside + 2 * PADDING
    ink, paper, bar, line = THEMES[theme][0]
    title = escape(cast.title)
    dots = "".join(f'<circle cx="{20 + 18 * i}" cy="17" r="5.5" fill="{line}"/>' for i in range(3))
    return f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" \
height="{height}" fill="{ink}" role="img" aria-labelledby="title" aria-describedby="desc">
<title id="title">{title}, recorded at a terminal</title>
<desc id="desc">{escape(transcript(cast), quote=False)}</desc>
<style>
text{{font:{SIZE}px {FONTS};white-space:pre}}
.bold{{font-weight:600}}
.italics{{font-style:italic}}
.underscore{{text-decoration:underline}}
@media (prefers-reduced-motion:no-preference){{
#log,#cover,#strip{{animation:{length:.2f}s step-end infinite}}
{keyframes}
}}
</style>
<defs>
{NEWLINE.join(strip.definitions)}
</defs>
<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9" fill="{paper}" \
stroke="{line}"/>
<path d="M1 {BAR}V9.5A8.5 8.5 0 0 1 9.5 1H{width - 9.5}A8.5 8.5 0 0 1 {width - 1} 9.5V{BAR}z" \
fill="{bar}"/>
{dots}
<text x="{width / 2:g}" y="{BAR / 2 + 5:g}" text-anchor="middle">{title}</text>
<svg x="{PADDING}" y="{BAR + PADDING}" width="{width - 2 * PADDING}" height="{inside}">
<g {still["log"]}>
{NEWLINE.join(log)}
<rect {still["cover"]} width="100%" height="{inside}" fill="{paper}"/>
</g>
<g {still["strip"]}>
{NEWLINE.join(strip.frames)}
</g>
</svg>
</svg>
"""


def _keyframes(times: list[float], values: list[str], length: float) -> str:
    """A keyframe where a value is another than before; it holds until the next one."""
    return "".join(
        f"{100 * time / length:.3f}".rstrip("0").rstrip(".") + f"%{{transform:translate({value})}}"
        for time, value, before in zip(times, values, ["", *values], strict=False)
        if value != before
    )


class _Canvas:
    def __init__(self, theme: str) -> None:
        (self.ink, self.paper, _, _), colours, bright = THEMES[theme]
        self._colours = dict(zip(NAMES, colours, strict=True))
        self._colours |= {f"bright{name}": x for name, x in zip(NAMES, bright, strict=True)}

    def row(self, row: Row, y: int) -> Iterator[str]:
        for run in runs(row):
            yield from self._run(run, y)

    def _run(self, run: Run, y: int) -> Iterator[str]:
        """Its background, if it has one, and its text."""
        style = run.style
        ink, paper = self._colour(style.ink, self.ink), self._colour(style.paper, self.paper)
        if style.reverse:
            ink, paper = paper, ink
        x, width = number(run.column * COLUMN), number(run.width * COLUMN)
        if paper != self.paper:
            yield f'<rect x="{x}" y="{y * LINE}" width="{width}" height="{LINE}" fill="{paper}"/>'
        if run.text.strip() or style.underscore:
            names = [name for name in ("bold", "italics", "underscore") if getattr(style, name)]
            more = f' textLength="{width}"' if len(run.text) > 1 else ""
            more += f' fill="{ink}"' if ink != self.ink else ""
            more += f' class="{" ".join(names)}"' if names else ""
            text = escape(run.text, quote=False)
            yield f'<text x="{x}" y="{y * LINE + SIZE}"{more}>{text}</text>'

    def _colour(self, name: str, default: str) -> str:
        """Of pyte's names, or of the hex digits that it has for the 256 and the true colours."""
        return default if name == "default" else self._colours.get(name, f"#{name}")


class _Strip:
    """Frames of what is not written yet, side by side; each line and each frame is there once."""

    def __init__(self, canvas: _Canvas, columns: int) -> None:
        self._canvas = canvas
        self._width = (columns + 2) * COLUMN  # a gap, for what a letter has outside its cell
        self._lines: dict[tuple, str] = {}
        self._frames: dict[tuple, int] = {}

    def add(self, frame: Frame, count: int) -> float:
        """Where the strip must be for this frame of which `count` lines are written."""
        lines = ((row - frame.top, cells) for row, cells in frame.rows.items() if row >= count)
        parts = [(0, y, self._line(cells)) for y, cells in lines if cells]
        if frame.cursor:
            row, column = frame.cursor
            parts.append((column, row - frame.top, "cursor"))
        return -self._width * self._frames.setdefault(tuple(parts), len(self._frames))

    def _line(self, cells: Row) -> str:
        return self._lines.setdefault(tuple(cells.items()), f"l{len(self._lines)}")

    @property
    def definitions(self) -> list[str]:
        cursor = f'<rect id="cursor" width="{COLUMN}" height="{LINE}" fill-opacity=".5"/>'
        shapes = (
            f'<g id="{name}">{"".join(self._canvas.row(dict(cells), 0))}</g>'
            for cells, name in self._lines.items()
        )
        return [cursor, *shapes]

    @property
    def frames(self) -> list[str]:
        return [
            f'<use href="#{name}" x="{number(i * self._width + column * COLUMN)}" y="{y * LINE}"/>'
            for parts, i in self._frames.items()
            for column, y, name in parts
        ]
