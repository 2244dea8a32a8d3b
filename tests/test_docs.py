"""What the docs say of files and functions is so."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import pytest
import typer

assert mlx_sleep  # imported for its effect

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "where-things-are.md"
SCRIPTS = ROOT / "docs" / "scripts"


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
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_every_figure_is_what_a_command_printed():
    """Tables and sentences with numbers come from docs/results/."""
    done = script("tables", "--check")
    assert done.returncode == 0, done.stderr


def settings() -> dict[str, dict[str, bool]]:
    """Numbers that are no measurements: a page's words, and whether the code has them so."""
    from mlx_sleep.cli.retrofit import retrofit
    from mlx_sleep.cli.sleeping import IDLE
    from mlx_sleep.convert.downloads import DOWNLOADS
    from mlx_sleep.lab.tasks.curriculum import STAGES
    from mlx_sleep.server import engine
    from tests import test_fuzz

    def default(command, option: str):
        return inspect.signature(command).parameters[option].default

    windows = [count for stage in STAGES for count in stage.windows]
    package = ROOT / "mlx_sleep"
    adapter = (package / "adapters" / "smollm2" / "adapters.safetensors").stat().st_size
    weights = mx.load(str(package / "embedded" / "model.safetensors"))
    cast = (ROOT / "docs" / "results" / "chat.cast").read_text(encoding="utf-8")
    return {
        "README.md": {
            "SmolLM2-135M (93 MB)": "93 MB" in DOWNLOADS["smollm2"].about,
            "Six sleep layers (11 MB; target 12)": round(adapter / 1e6) == 11,
            "waits are cut to a second": '"idle_time_limit": 1.0,' in cast,
            "left alone for ten seconds": IDLE == 10,
        },
        "docs/retrofit.md": {
            "a folder of 11 MB": round(adapter / 1e6) == 11,
            "over 2 to 16 windows": (min(windows), max(windows)) == (2, 16),
            "`--ordinary 200`": default(retrofit, "ordinary") == 200,
        },
        "docs/training.md": {
            "has 1.05 million parameters": round(sum(x.size for x in weights.values()), -4)
            == 1_050_000
        },
        "docs/models.md": {
            "# 400 steps;": '"--steps", type=int, default=400'
            in (ROOT / "examples" / "train_in_pytorch.py").read_text(),
        },
        "docs/server.md": {
            "After ten seconds without a request": IDLE == 10,
            "Five minutes after its last use": engine.UNUSED == 300,
            "Four replies at a time": engine.AT_ONCE == 4,
            "68 requests may be there at once, four of one memory": engine.AT_ONCE + engine.QUEUED
            == 68
            and engine.QUEUED_A_MEMORY == 4,
        },
        "docs/memories.md": {"each reader 300 damaged": test_fuzz.COUNT == 300},
    }


def prose(page: Path) -> str:
    """A page without code and tables, in one line."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    text = re.sub(r"<!-- results.*?<!-- end[^\n]*", "", text, flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("    ", "|"))]
    return " ".join(re.sub(r"`[^`]*`", "`code`", " ".join(lines)).split())


def test_settings_are_the_codes():
    for page, words in settings().items():
        text = " ".join((ROOT / page).read_text().split())
        for said, right in words.items():
            assert said in text and right, f"{page}: {said}"


def test_every_number_is_checked(monkeypatch):
    """What looks measured stands in a sentence of docs/results/ or of the settings above."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    found: list[str] = []
    checked = [*tables.sentences()]
    checked += [(page, words) for page, found in settings().items() for words in found]
    for page in tables.pages():
        name = page.relative_to(ROOT).as_posix()
        if name == "docs/cli.md":  # made from the code
            continue
        text = prose(page)
        for where, words in checked:
            if where == name:
                text = text.replace(" ".join(re.sub(r"`[^`]*`", "`code`", words).split()), "")
        units = r"%|times|points|million|minutes|hours|seconds|tokens|ms|[kMGT]B"
        found += [f"{name}: {m}" for m in re.findall(rf"\b\d[\d.,]* ?(?:{units})(?!\w).*", text)]
    assert not found


def test_the_recipes_take_so_many_steps():
    rows = json.loads((ROOT / "docs" / "results" / "train_embedded.json").read_text())["rows"]
    recipes = ROOT / "mlx_sleep" / "training" / "recipes"
    for row in rows:
        stages = json.loads((recipes / f"{row['id']}.json").read_text())["stages"]
        assert row["steps"] == sum(stage["steps"] for stage in stages), row["id"]


def test_the_front_page_counts_the_comparisons():
    rows = json.loads((ROOT / "docs" / "results" / "parity.json").read_text())["rows"]
    cases, architectures = sum(row["cases"] for row in rows), {row["architecture"] for row in rows}
    assert all(row["agreement"] == 1 for row in rows)
    said = f"{cases} comparisons over {len(architectures)} architectures, most of them with PyTorch"
    assert said in (ROOT / "README.md").read_text()


def test_a_stale_figure_is_found(tmp_path, monkeypatch):
    """The check above can fail: for a table, and for a sentence."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    page = "<!-- results: bench_sleep -->\nold\n<!-- end of bench_sleep -->"
    assert "| 8 | 0.0" in tables.filled(page)
    (tmp_path / "a.json").write_text(
        '{"rows": [{"id": "x", "n": 3}], "said": {"README.md": ["no such {x[n]} words"]}}'
    )
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.missing() == ["README.md: no such 3 words"]


def test_a_row_from_another_table(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tables

    (tmp_path / "a.json").write_text('{"rows": [{"id": "x", "n": 3, "what": "theirs"}]}')
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = [{"from": "a/x", "what": "ours", "show": {"n": "{n:.1f}"}}, {"what": "own", "n": 4}]
    of = {"columns": [["what", "{what}", "left"], ["n", "{n}", "right"]], "rows": rows}
    page = tables.table({**of, "command": "c", "measured": "m"})
    assert "| ours | 3.0 |\n| own | 4 |" in page


def test_the_command_line_reference_is_the_commands():
    page = (ROOT / "docs" / "cli.md").read_text()
    if f"typer {typer.__version__};" not in page:
        pytest.skip("written by another typer, which words it in another way")
    done = script("cli", "--check")
    assert done.returncode == 0, done.stderr


def test_the_diagrams_are_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
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
    monkeypatch.syspath_prepend(str(SCRIPTS))
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


def test_images_are_for_a_light_and_a_dark_page():
    drawn = {path.name for path in (ROOT / "docs" / "images").iterdir()}
    assert {name.replace("-light.", "-dark.") for name in drawn if "-light." in name} == {
        name for name in drawn if "-light." not in name
    }
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        text = page.read_text()
        assert "](docs/images/" not in text and "](images/" not in text, page.name
        dark = re.findall(r'srcset="([^"]+-dark[^"]+)"', text)
        light = [name.replace("-dark.", "-light.") for name in dark]
        assert re.findall(r'<img [^>]*src="([^"]+)"', text) == light, page.name


def test_the_front_page_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
