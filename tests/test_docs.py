"""What the docs say of files and functions is so."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

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


def script(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "docs" / "scripts" / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_every_figure_is_what_a_command_printed():
    """Tables and sentences with numbers come from docs/results/."""
    done = script("tables", "--check")
    assert done.returncode == 0, done.stderr


def test_a_stale_figure_is_found(tmp_path, monkeypatch):
    """The check above can fail: for a table, and for a sentence."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    import tables

    page = "<!-- results: bench_sleep -->\nold\n<!-- end of bench_sleep -->"
    assert "| 8 | 0.0" in tables.filled(page)
    (tmp_path / "a.json").write_text(
        '{"rows": [{"id": "x", "n": 3}], "said": {"README.md": ["no such {x[n]} words"]}}'
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.missing() == ["README.md: no such 3 words"]


def test_the_command_line_reference_is_the_commands():
    page = (ROOT / "docs" / "cli.md").read_text()
    if f"typer {typer.__version__};" not in page:
        pytest.skip("written by another typer, which words it in another way")
    done = script("cli", "--check")
    assert done.returncode == 0, done.stderr


def test_the_diagrams_are_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    import diagram

    for theme in diagram.THEMES:
        drawn = (ROOT / "docs" / "images" / f"sleep-{theme}.svg").read_text()
        assert drawn == diagram.draw(theme)


def test_the_figures_are_the_results():
    matplotlib = pytest.importorskip("matplotlib")
    drawn = (ROOT / "docs" / "images" / "recall-light.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}," not in drawn:
        pytest.skip("drawn by another matplotlib, which writes them in another way")
    done = script("figures", "--check")
    assert done.returncode == 0, done.stderr


def test_a_stale_drawing_is_found(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "scripts"))
    import figures

    other = figures.results("recall_smollm2")
    other["rows"][-1]["accuracy"] = 0.123
    drawn = figures.svg("recall", "light")
    monkeypatch.setattr(figures, "results", lambda name: other)
    assert figures.svg("recall", "light") != drawn


def test_links_lead_somewhere():
    """Of the README and the pages; those out of the project are not followed."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
        links += re.findall(r'(?:src|srcset)="([^"]+)"', text)
        inside = [link for link in links if "://" not in link]
        missing = [link for link in inside if not (page.parent / link).exists()]
        assert not missing, page.name
        if page.parent.name == "docs":  # mkdocs knows no others
            assert all(
                (page.parent / link).resolve().is_relative_to(page.parent) for link in inside
            )


def test_the_front_page_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
