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
        folders = [ROOT, ROOT / "mlx_sleep"]
        files = []
        for name in names:
            # A bare file name is in the folder of the one before it.
            if name.endswith((".py", "/")):
                found = [folder / name for folder in folders if (folder / name).exists()]
                assert found, f"{question} {name}"
                files += found
                folders.append(found[0] if found[0].is_dir() else found[0].parent)
        sources = [p for f in files for p in (f.glob("*.py") if f.is_dir() else [f])]
        text = "".join(source.read_text() for source in sources)
        for name in names:
            if name.isidentifier():
                assert re.search(rf"\bdef {name}\b", text), f"{question} {name}"
