"""The command `study`: the tables and figures made of its runs."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_sleep.cli import app
from mlx_sleep.lab.statistics import wilson
from mlx_sleep.lab.study import figures, scheduler, table
from mlx_sleep.utils.errors import UserError
from tests.studies import PLAN


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of five runs, two at a time: its folder, and what the command printed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "plan.json").write_text(json.dumps(PLAN))
    command = [
        "study",
        "rule110",
        "--size",
        str(folder / "plan.json"),
        "--out",
        str(folder / "out"),
    ]
    command += ["--jobs", "2", "--model", "hybrid,looped", "--passes", "1"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder, command, done


def test_results_have_the_rows_of_the_runs(study):
    folder, _, done = study
    found = json.loads((folder / "out" / "results.json").read_text())
    keys = "task size model difficulty passes seed tokens accuracy low high".split()
    assert all(list(row) == keys for row in found["rows"] + found["curve"])
    points = [(r["model"], r["difficulty"], r["passes"], r["seed"]) for r in found["rows"]]
    assert sorted(points) == [
        *(("hybrid", d, 1, s) for d in (1, 2) for s in (0, 1)),
        ("looped", 2, 1, 0),
    ]
    assert {r["tokens"] for r in found["rows"]} == {4 * 4 * 13}
    assert sorted({r["tokens"] for r in found["curve"]}) == [2 * 4 * 13, 4 * 4 * 13]
    for row in found["rows"]:
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1
        name = f"{row['model']}-d{row['difficulty']}-n1-s{row['seed']}"
        assert (folder / "out" / name / "metrics.jsonl").read_text().count("\n") == 4
    assert [(r["model"], r["passes"]) for r in found["latency"]] == [
        ("hybrid", 1),
        ("hybrid", 0),
        ("looped", 1),
        ("looped", 0),
    ]
    text = (folder / "out" / "results.md").read_text()
    assert text in done.output and "| looped | 1 |" in text and "t = 2 (always:" in text


def test_a_second_study_does_nothing_twice(study, monkeypatch):
    folder, command, _ = study
    monkeypatch.setattr(scheduler, "_start", None)
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    assert found == json.loads((folder / "out" / "results.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**PLAN, "batch": 8}))
    with pytest.raises(UserError, match="another config"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    (folder / "plan.json").write_text(json.dumps(PLAN))


def test_figures_without_matplotlib(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install 'mlx-sleep\\[plot\\]'"):
        CliRunner().invoke(app, [*study[1], "--figures"], catch_exceptions=False)


def test_a_study_of_two_points_has_no_figures(study, tmp_path):
    pytest.importorskip("matplotlib")
    found = json.loads((study[0] / "out" / "results.json").read_text())
    assert figures.draw(found, tmp_path) == []


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    hybrid = [
        {
            "model": "hybrid",
            "seed": seed,
            "difficulty": 2,
            "passes": N,
            "accuracy": 0.2 * N + seed / 20,
        }
        for N in (1, 2, 4)
        for seed in (0, 1)
    ]
    flops = {"model": "hybrid_flops", "seed": 0, "difficulty": 2, "passes": 1, "accuracy": 0.9}
    found = {
        "task": "rule110",
        "always": {"2": 0.16},
        "rows": [*hybrid, flops],
        "curve": [{**row, "tokens": tokens} for row in hybrid for tokens in (1e6, 2e6, 3e6)],
        "retention": [
            {**row, "model": model, "further": further}
            for row in hybrid
            for further in (1, 2, 4)
            for model in ("hybrid", "transformer")
        ],
    }
    paths = figures.draw(found, tmp_path)
    assert [p.name for p in paths] == ["passes.png", "tokens.png", "retention.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    (panel,) = figures.passes(found).axes
    assert panel.get_title() == "t = 2" and panel.get_ylabel() == "accuracy (%)"
    seeds, alone = panel.collections
    # Side by side, and the mean through the middle.
    assert np.allclose(seeds.get_offsets()[:2], [[0.965, 0.2], [1.035, 0.25]])
    line, square, guessing = panel.lines
    assert np.allclose(line.get_xydata(), [[1, 0.225], [2, 0.425], [4, 0.825]])
    assert len(alone.get_offsets()) == 1 and square.get_linestyle() == "None"
    assert guessing.get_ydata() == [0.16, 0.16]


def test_a_curve_joins_seeds_by_examination():
    # Padding makes the numbers of tokens differ from seed to seed.
    rows = [
        {"seed": seed, "tokens": tokens, "accuracy": accuracy}
        for seed, tokens, accuracy in (
            (0, 21e6, 0.5),
            (0, 10e6, 0.1),
            (1, 11e6, 0.3),
            (1, 20e6, 0.7),
        )
    ]
    assert figures._examinations(rows) == [[(10, 0.1), (11, 0.3)], [(21, 0.5), (20, 0.7)]]


def test_bad_options():
    for options, message in ((["--jobs", "0"], "--jobs"), (["--passes", "9"], "passes 9")):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["study", "rule110", *options], catch_exceptions=False)


def test_pooled_rows_put_the_seeds_together():
    rows = [
        {"passes": 1, "seed": 1, "accuracy": 0.5, "tokens": 10},
        {"passes": 1, "seed": 0, "accuracy": 0.3, "tokens": 10},
        {"passes": 2, "seed": 0, "accuracy": 1.0, "tokens": 20},
    ]
    one, two = table.pooled(rows, ("passes",), 50)
    assert one["accuracy"] == pytest.approx(0.4) and one["seeds"] == [0.3, 0.5]
    assert (one["low"], one["high"]) == pytest.approx(wilson(40, 100))
    assert two["tokens"] == 20 and (two["low"], two["high"]) == wilson(50, 50)
