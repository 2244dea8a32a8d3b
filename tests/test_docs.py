"""What the docs say of files and functions is so."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "where-things-are.md"


def test_every_place_is_there():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 10
    for row in rows:
        question, answer = (cell.strip() for cell in row.strip("|").split("|"))
        names = re.findall(r"`([^`]+)`", answer)
        files = [name for name in names if name.endswith((".py", "/"))]
        sources = []
        for name in files:
            found = [f for f in (ROOT / name, ROOT / "mlx_sleep" / name) if f.exists()]
            assert found, f"{question} {name}"
            sources += found[0].glob("*.py") if found[0].is_dir() else found
        text = "".join(source.read_text() for source in sources)
        for name in set(names) - set(files):
            assert re.search(rf"\bdef {name}\b", text), f"{question} {name}"
