"""A terminal recording, asciicast v2: https://docs.asciinema.org/manual/asciicast/v2/"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Cast:
    """What a terminal of columns x rows was sent, and when.

    events  (seconds since the start, text), in order, as it really went
    pause   seconds: players show no longer wait than this (asciicast's idle_time_limit)
    """

    columns: int
    rows: int
    title: str
    pause: float
    events: list[tuple[float, str]] = field(default_factory=list)

    def shortened(self) -> Iterator[tuple[float, str]]:
        """The events as they are shown: no wait between two is longer than `pause`."""
        shown = before = 0.0
        for time, text in self.events:
            shown += min(time - before, self.pause)
            before = time
            yield shown, text

    def write(self, file: Path) -> None:
        header = {
            "version": 2,
            "width": self.columns,
            "height": self.rows,
            "idle_time_limit": self.pause,
            "title": self.title,
        }
        events = ([round(time, 3), "o", text] for time, text in self.events)
        lines = (json.dumps(value, ensure_ascii=False) for value in (header, *events))
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Cast:
        """ValueError for a file of another kind or version."""
        header, *events = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
        if header.get("version") != 2:
            raise ValueError(f"{file} is not an asciicast of version 2")
        return cls(
            header["width"],
            header["height"],
            header["title"],
            header["idle_time_limit"],
            [(time, text) for time, kind, text in events if kind == "o"],
        )
