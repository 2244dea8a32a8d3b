"""The recording of the front page: what is typed, what is kept of it, and how it is drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "docs" / "scripts"
RESULTS = ROOT / "docs" / "results"
SVG = "{http://www.w3.org/2000/svg}"

pytest.importorskip("pyte", reason="draws the docs: pip install -e '.[docs]'")
pytest.importorskip("ptyprocess")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def made_up(pause: float = 2.0):
    """Typed lines, a status that comes and goes, colours, more lines than there are rows."""
    from recording.cast import Cast

    texts = [
        "$ ",
        *"ls <&>",
        "\r\n\x1b[2mfaint\x1b[0m \x1b[1;31mred\x1b[0m \x1b[38;5;2mx\x1b[0m\r\n",
    ]
    texts += [
        "漢字 wide\r\n",
        "\x1b[7mstatus \x1b[0m\x1b[?25l",
        "\r\x1b[2K\x1b[?25h",
        "$ ",
        *"'\"!",
    ]
    texts += [f"\r\nline {i}" for i in range(5)]
    events = [(i / 10, text) for i, text in enumerate(texts)]
    return Cast(20, 6, "a <made-up> cast", pause, [*events, (60.0, "\r\n$ ")])


def keyframes(svg: ElementTree.Element) -> dict[str, list[tuple[float, float]]]:
    """Of each animation: (percent, pixels)."""
    css = svg.find(f"{SVG}style").text
    found = re.findall(r"@keyframes (\w+)\{(.*)\}", css)
    step = re.compile(r"([\d.]+)%\{transform:translate\((?:0,)?(-?[\d.]+)px(?:,0)?\)\}")
    return {name: [(float(a), float(b)) for a, b in step.findall(body)] for name, body in found}


def at(steps: list[tuple[float, float]], percent: float) -> float:
    """The value of a keyframe that holds until the next."""
    return [value for time, value in steps if time <= percent + 1e-3][-1]


def seen(svg: ElementTree.Element, percent: float, columns: int, rows: int) -> list[str]:
    """What a browser shows: the log that is not covered, and one frame of the strip over it."""
    from recording.svg import COLUMN, LINE, SIZE

    moves = keyframes(svg)
    log, cover, strip = (at(moves[name], percent) for name in ("log", "cover", "strip"))
    grid = [[" "] * columns for _ in range(rows)]

    def put(text, left, top):
        row, column = round((top - SIZE) / LINE), round((float(text.get("x")) + left) / COLUMN)
        if 0 <= row < rows and 0 <= column < columns:
            grid[row][column : column + len(text.text)] = text.text

    for text in svg.iterfind(f".//{SVG}g[@id='log']/{SVG}text"):
        if float(text.get("y")) < cover:
            put(text, 0, float(text.get("y")) + log)
    for use in svg.iterfind(f".//{SVG}g[@id='strip']/{SVG}use"):
        shape = svg.find(f".//*[@id='{use.get('href')[1:]}']")
        for text in shape.iter(f"{SVG}text"):
            put(text, float(use.get("x")) + strip, float(use.get("y")) + float(text.get("y")))
    return ["".join(row).rstrip() for row in grid]


def test_the_svg_shows_at_each_time_what_the_terminal_showed():
    from recording.screen import frames
    from recording.svg import HOLD, draw

    cast = made_up()
    svg = ElementTree.fromstring(draw(cast, "dark"))
    shown = list(frames(cast))
    length = shown[-1].time + HOLD
    assert len(shown) > 20 and shown[-1].top == 4
    for frame in shown:
        cells = [frame.rows[row] for row in sorted(frame.rows)]
        screen = [
            "".join(row[x].text if x in row else " " for x in range(20)).rstrip() for row in cells
        ]
        percent = 100 * frame.time / length
        assert seen(svg, percent, cast.columns, cast.rows) == screen


def test_the_svg_is_sound_and_stands_still_where_nothing_may_move():
    from recording.svg import THEMES, draw

    text = draw(made_up(), "light")
    svg = ElementTree.fromstring(text)
    assert svg.find(f"{SVG}title").text.startswith("a <made-up> cast")
    assert "$ ls <&>\nfaint red x\n漢字 wide\n" in svg.find(f"{SVG}desc").text
    assert "<script" not in text and "href=" in text and 'href="http' not in text
    moves = keyframes(svg)
    assert set(moves) == {"log", "cover", "strip"}
    for name, steps in moves.items():
        times = [time for time, _ in steps]
        assert times[0] == 0 and times == sorted(set(times)) and times[-1] < 100
        still = svg.find(f".//*[@id='{name}']").get("transform")
        assert str(steps[-1][1]).removesuffix(".0") in re.split("[(,)]", still)
    before, _, moving = text.partition("@media (prefers-reduced-motion:no-preference){")
    assert "animation" not in before and "step-end infinite" in moving

    colours = {node.text: node for node in svg.iter(f"{SVG}text") if node.text}
    _, named, bright = THEMES["light"]
    assert colours["faint"].get("fill") == bright[0]
    assert colours["red"].get("fill") == named[1] and colours["red"].get("class") == "bold"
    assert colours["x"].get("fill") == "#00cd00"  # number 2 of 256, which is no faint text
    wide = [float(colours[character].get("x")) for character in "漢字"]
    assert wide == [0, pytest.approx(16.8)]
    assert THEMES["light"][0][0] in {box.get("fill") for box in svg.iter(f"{SVG}rect")}  # reverse


def test_a_cast_is_kept_as_it_was_and_shown_with_shorter_waits(tmp_path):
    from recording.cast import Cast

    cast = made_up(pause=0.5)
    cast.write(tmp_path / "a.cast")
    again = Cast.read(tmp_path / "a.cast")
    assert again == cast and again.events[-1][0] == 60
    times = [time for time, _ in cast.shortened()]
    assert times[-1] - times[-2] == pytest.approx(0.5) and times[1] == pytest.approx(0.1)
    (tmp_path / "b.cast").write_text('{"version": 3}\n')
    with pytest.raises(ValueError, match="not an asciicast of version 2"):
        Cast.read(tmp_path / "b.cast")


PROGRAM = """
import sys, termios, tty
mode = termios.tcgetattr(0)
tty.setcbreak(0)
print("\\x1b[6n", end="", flush=True)
place = "".join(iter(lambda: sys.stdin.read(1), "R"))
termios.tcsetattr(0, termios.TCSANOW, mode)
print("asked:", place[1:])
while (line := input("> ")) != "bye": print("said:", line)
"""


@pytest.fixture
def type_script(monkeypatch):
    """Types into a program that asks where the cursor is, then says again what it is told."""
    import os

    from recording import typist
    from recording.cast import Cast

    for name in ("KEY", "BEFORE", "ENTER", "AFTER"):
        monkeypatch.setattr(typist, name, 0.002)

    def type_script(script: str, limit: float = 20) -> Cast:
        cast = Cast(40, 10, "a program", 1.0)
        env = {**os.environ, "TERM": "xterm-256color"}
        typist.record([sys.executable, "-c", PROGRAM], script, cast, env, limit)
        return cast

    return type_script


def test_a_script_is_typed_at_a_terminal(type_script):
    from recording.screen import transcript

    cast = type_script("# a comment\n> hello, you\n(until said:)\n\n> é\n(until said: é)\n")
    assert transcript(cast) == "asked: [1;1\n> hello, you\nsaid: hello, you\n> é\nsaid: é\n>\n"
    times = [time for time, _ in cast.events]
    assert times == sorted(times) and len(times) > len("hello, you")


def test_a_script_that_waits_in_vain_says_what_was_on_the_screen(type_script):
    with pytest.raises(TimeoutError, match=r"(?s)\(until slept:\): not after 3 s:\nasked.*said"):
        type_script("> hello\n(until slept:)\n", limit=3)
    with pytest.raises(EOFError, match=r"(?s)has ended:\n.*> bye"):
        type_script("> bye\n> more\n")
    with pytest.raises(ValueError, match="means nothing: hello"):
        type_script("hello\n")


def test_the_picture_is_what_the_recording_gives():
    from record import CAST, TEXT
    from recording.cast import Cast
    from recording.screen import transcript
    from recording.svg import THEMES, draw

    cast = Cast.read(CAST)
    assert TEXT.read_text(encoding="utf-8") == transcript(cast)
    for theme in THEMES:
        drawn = (ROOT / "docs" / "images" / f"chat-{theme}.svg").read_bytes()
        assert drawn.decode() == draw(cast, theme) and len(drawn) < 300_000


def is_in_order(some: list[str], all_of_them: list[str]) -> bool:
    rest = iter(all_of_them)
    return all(line in rest for line in some)


def test_the_readme_and_the_script_are_of_the_recording():
    from record import README, SCRIPT, TEXT

    lines = TEXT.read_text(encoding="utf-8").splitlines()
    session = re.search(r"```\n(\$ mlx-sleep chat\n.*?)```", README.read_text(), re.DOTALL)
    shown = session[1].splitlines()
    assert len(shown) > 10 and is_in_order(shown, lines)
    assert not is_in_order([*shown, "You live in Paris."], lines)
    typed = [line for line in SCRIPT.read_text().splitlines() if line.startswith(("$ ", "> "))]
    assert is_in_order(typed, lines)
