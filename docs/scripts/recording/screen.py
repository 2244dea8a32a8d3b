"""What a terminal shows, by pyte: its cells, and how far it has scrolled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pyte

from .cast import Cast


class Style(NamedTuple):
    """Colours are pyte's: "default", a name as "red" or "brightblack", or six hex digits."""

    ink: str = "default"
    paper: str = "default"
    bold: bool = False
    italics: bool = False
    underscore: bool = False
    reverse: bool = False


class Cell(NamedTuple):
    text: str
    width: int  # columns, 1 or 2
    style: Style


Row = dict[int, Cell]
"""The cells of a row by their column, up to the last that shows anything."""


class Screen(pyte.Screen):
    """A screen that keeps the rows that have left it at the top, and knows faint text.

    answer gets what a terminal types by itself: a program may ask it where the cursor is.
    """

    def __init__(
        self, columns: int, rows: int, answer: Callable[[str], None] = lambda text: None
    ) -> None:
        self._answer = answer
        self.gone: list[Row] = []
        self._rows: dict[int, Row] = {}
        super().__init__(columns, rows)

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def index(self) -> None:
        if self.cursor.y == self.lines - 1:
            self.gone.append(self._row(0))
        super().index()

    def select_graphic_rendition(self, *attrs: int, **private: bool) -> None:
        """pyte has no faint text (2): it is taken for grey, as most terminals show it."""
        if private:  # of the keyboard, not of the text
            return
        if 38 not in attrs and 48 not in attrs:  # there a 2 means another thing
            attrs = tuple(90 if attr == 2 else attr for attr in attrs)
        super().select_graphic_rendition(*attrs)

    def rows(self) -> list[Row]:
        for y in self.dirty:
            self._rows[y] = self._row(y)
        self.dirty.clear()
        return [self._rows[y] for y in range(self.lines)]

    def _row(self, y: int) -> Row:
        cells: Row = {}
        line = self.buffer[y]
        for x in range(self.columns):
            char = line[x]
            if char.data:  # "" is the right half of a wide one
                wide = x + 1 < self.columns and not line[x + 1].data
                paper = char.bg.replace("bfight", "bright")  # pyte 0.8.2's magenta
                style = Style(
                    char.fg, paper, char.bold, char.italics, char.underscore, char.reverse
                )
                cells[x] = Cell(char.data, 1 + wide, style)
        while cells and _is_blank(next(reversed(cells.values()))):
            cells.popitem()
        return cells

    @property
    def left_of_cursor(self) -> str:
        return self.display[self.cursor.y][: self.cursor.x]

    @property
    def above_cursor(self) -> str:
        return self.display[self.cursor.y - 1].rstrip() if self.cursor.y else ""


def _is_blank(cell: Cell) -> bool:
    style = cell.style
    return cell.text == " " and style.paper == "default" and not (style.reverse or style.underscore)


class Frame(NamedTuple):
    """What is seen from `time` on. Rows are counted from the first line that ever was there."""

    time: float
    top: int  # the first row on the screen
    rows: dict[int, Row]
    cursor: tuple[int, int] | None  # row, column; None while hidden


def frames(cast: Cast, rate: float = 15) -> Iterator[Frame]:
    """The screens of a recording, at most `rate` a second; waits are shortened."""
    screen = Screen(cast.columns, cast.rows)
    stream = pyte.Stream(screen)
    tick = 0  # of the frame that is being made
    for time, text in cast.shortened():
        if int(time * rate) > tick:
            yield _frame(screen, tick / rate)
            tick = int(time * rate)
        stream.feed(text)
    yield _frame(screen, tick / rate)


def _frame(screen: Screen, time: float) -> Frame:
    top, cursor = len(screen.gone), screen.cursor
    rows = dict(enumerate(screen.rows(), top))
    at = None if cursor.hidden else (top + cursor.y, min(cursor.x, screen.columns - 1))
    return Frame(time, top, rows, at)


def transcript(cast: Cast) -> str:
    """The text of all lines as they were last seen, those that have scrolled away too."""
    screen = Screen(cast.columns, cast.rows)
    stream = pyte.Stream(screen)
    for _, text in cast.events:
        stream.feed(text)
    rows = [*screen.gone, *screen.rows()]
    lines = ("".join(cell.text for cell in row.values()).rstrip() for row in rows)
    return "\n".join(lines).rstrip() + "\n"
