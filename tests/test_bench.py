"""The benchmarks: their rows, what they print, and that they measure what they say."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import json
import sys
from types import SimpleNamespace

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_sleep.cli import output
from mlx_sleep.cli.bench import app
from mlx_sleep.lab import timing
from mlx_sleep.lab.bench import ops, reply, sleep, wake
from mlx_sleep.lab.statistics import ratio
from mlx_sleep.lab.study import data_speed
from mlx_sleep.models import mlx_lm_model
from mlx_sleep.models.load import save
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_tokenizer

assert mlx_sleep  # imported for its effect

CONFIG = {
    "model_type": "sleep_hybrid",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "layer_types": ["attention", "gated_deltanet"],
    "num_attention_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "sleep": {"passes": 2, "window": 16},
}


@pytest.fixture(scope="module")
def model():
    return Model(ModelArgs.from_dict(CONFIG))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "model"
    save(path, model, CONFIG)
    return path


def test_rounds_are_interleaved_and_the_first_is_warm_up():
    asked = []

    def clock(name):
        def seconds():
            asked.append(name)
            return float(len(asked))

        return seconds

    assert timing.interleave([clock("a"), clock("b")], 2) == [[4.0, 5.0], [3.0, 6.0]]
    assert "".join(asked) == "abbaab"  # each round begins with another one


@pytest.fixture
def wall(monkeypatch):
    """A wall clock that moves only when a test says so: wall.now is in seconds."""
    fake = SimpleNamespace(now=0.0)
    fake.perf_counter = lambda: fake.now
    monkeypatch.setattr(timing, "time", fake)
    monkeypatch.setattr(sleep, "time", fake)
    return fake


def test_clock_waits_for_the_arrays(wall, monkeypatch):
    evaluated = []

    def evaluate(*trees):
        evaluated.extend(trees)
        wall.now += 3

    monkeypatch.setattr(mx, "eval", evaluate)
    x = mx.ones(4)
    assert timing.clock(lambda x: {"deep": [x]}, x)() == 3
    assert evaluated[0]["deep"][0] is x


def test_ratio_is_the_median_of_pairs():
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0


def test_ops_rows_compare_the_same_numbers():
    rows = list(ops.rows(1, [(1, 40, 2, 8, 4)]))
    assert len(rows) == 6
    for row in rows:
        assert list(row) == ["op", "shape", "direction", "against", "ratio", "error"]
        assert row["shape"] == [1, 40, 2, 8, 4]
        assert row["ratio"] > 0 and row["error"] < 1e-4
    cases = {(r["op"], r["direction"], r["against"]) for r in rows}
    for direction in ("forward", "forward_backward"):
        for case in (("gated_delta", "mlx.fast"), ("gated_delta", "mlx-lm"), ("ssd", "mlx-lm")):
            assert (case[0], direction, case[1]) in cases


def test_ops_rows_would_show_a_wrong_result(monkeypatch):
    right = ops.gated_delta
    monkeypatch.setattr(ops, "gated_delta", lambda *args: [1.01 * x for x in right(*args)])
    row = next(ops.rows(1, [(1, 20, 2, 8, 4)]))
    assert row["error"] == pytest.approx(0.01, rel=0.1)


def test_the_embedded_shape_is_one_of_the_shapes():
    *_, last = ops.shapes()
    assert len(ops.shapes()) == 3 and len(last) == 5


def test_wake_rows(model):
    rows = list(wake.rows(model, passes=(1, 3), histories=(40, 16), repeats=1))
    assert [(r["history"], r["passes"]) for r in rows] == [
        (h, n) for h in (16, 40) for n in (1, 3, 0)
    ]
    S = 2 * 8 * 4 * 4  # heads x Dk x Dv float32, one layer
    for row in rows:
        assert row["ms_per_token"] > 0 and row["ratio_to_full_kv"] > 0
        assert row["state_bytes"] == S
        kv = 2 * 16 * 4 * row["history"]  # keys and values of one layer
        assert row["kv_bytes"] == (0 if row["passes"] else kv)
    assert all(r["ratio_to_n1"] == 1 for r in rows if r["passes"] == 1)
    assert all(r["ratio_to_full_kv"] == 1 for r in rows if r["passes"] == 0)
    assert next(wake.rows(model, (2,), (4,), 1))["ratio_to_n1"] is None


def test_reply_rows(monkeypatch):
    """Both sides say as much, whatever the tokenizer calls an end."""
    config = {
        "model_type": "llama",
        "vocab_size": 360,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    llama = mlx_lm_model.Model(mlx_lm_model.ModelArgs.from_dict(config))
    monkeypatch.setattr(reply, "REPLY", 6)
    letter = fake_tokenizer().encode_text("a")[-1]  # bytes would come as one piece at the end
    endless = reply._endless(fake_tokenizer())
    ends = mx.where(mx.arange(400) == 1, 9.0, mx.where(mx.arange(400) == letter, 5.0, 0.0))[None]
    assert endless(ends).item() == letter
    monkeypatch.setattr(reply, "_endless", lambda _: lambda logprobs: mx.array([letter]))
    rows = list(reply.rows(llama, fake_tokenizer(), windows=(60, 30), repeats=1))
    assert [20 < row["window"] < 50 for row in rows] == [True, False]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / row["mlx_lm_tokens_per_s"])


def test_a_reply_is_compared_with_mlx_lms_models_only(model):
    with pytest.raises(UserError, match="mlx-lm can't run"):
        next(reply.rows(model, fake_tokenizer()))


def test_sleep_rows(model):
    rows = list(sleep.rows(model, passes=(1, 4), repeats=1))
    assert [r["passes"] for r in rows] == [1, 4] and {r["tokens"] for r in rows} == {16}
    for row in rows:
        assert row["seconds"] > 0 and row["ratio_to_prefill"] > 0 and row["cancel_ms"] >= 0


def test_data_rows():
    rows = list(data_speed.rows(1, ["depo"]))
    assert [row["size"] for row in rows] == ["paper", "small", "tiny"]
    paper = rows[0]
    assert paper["tokens"] == paper["batch"] * (300 + 60)
    assert paper["ms"] > 0
    assert paper["tokens_per_second"] == pytest.approx(
        1000 * paper["tokens"] / paper["ms"], rel=1e-3
    )


def test_cancel_ms_is_at_most_a_block(model, wall, monkeypatch):
    """With blocks of 20 ms, a request waits for one block and not for the whole sleep."""
    block = Model.block

    def slow(self, *args):
        wall.now += 0.02
        return block(self, *args)

    monkeypatch.setattr(Model, "block", slow)
    (row,) = sleep.rows(model, passes=(6,), repeats=1)
    assert row["seconds"] == pytest.approx(6 * 2 * 0.02)
    # Model.hidden runs the same two blocks once.
    assert row["ratio_to_prefill"] == pytest.approx(1)
    assert 10 < row["cancel_ms"] <= 20.001


@pytest.mark.parametrize(
    ("command", "fields"),
    (
        (
            ["wake", "--history", "8,20", "--passes", "1,2"],
            "passes history ms_per_token ratio_to_n1 ratio_to_full_kv state_bytes kv_bytes",
        ),
        (["sleep", "--passes", "2"], "passes tokens seconds ratio_to_prefill cancel_ms"),
    ),
)
def test_json_is_all_there_is_on_standard_output(folder, command, fields):
    result = CliRunner().invoke(app, [*command, "--model", str(folder), "--repeats", "1", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert list(printed) == ["command", "device", "rows"]
    assert printed["command"] == f"bench {command[0]}" and "mlx" in printed["device"]
    assert all(list(row) == fields.split() for row in printed["rows"])


def test_table_on_the_screen(folder):
    result = CliRunner().invoke(app, ["sleep", "--model", str(folder), "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert "ratio to prefill" in result.stdout and "{" not in result.stdout


@pytest.mark.parametrize("bad", ("0", "-1", "1,,2", "two", "1.5", ""))
@pytest.mark.parametrize("option", ("--passes", "--history"))
def test_bad_numbers_are_one_clear_line(option, bad):
    with pytest.raises(UserError, match=f"{option} takes whole numbers"):
        CliRunner().invoke(app, ["wake", f"{option}={bad}"], catch_exceptions=False)


def test_plot(model, tmp_path):
    pytest.importorskip("matplotlib")
    for module, rows in (
        (ops, ops.rows(1, [(1, 8, 2, 4, 4)])),
        (wake, wake.rows(model, (1,), (8, 16), 1)),
        (sleep, sleep.rows(model, (1, 2), repeats=1)),
        (data_speed, data_speed.rows(1, ["depo"])),
    ):
        picture = output.Plot(tmp_path / "plot.png")
        module.plot(list(rows), picture.axes)
        picture.save()
        assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "plot.png").unlink()
    with pytest.raises(UserError, match="must end in"):
        output.Plot(tmp_path / "plot.txt")
    with pytest.raises(UserError, match="no folder"):
        output.Plot(tmp_path / "none" / "plot.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        output.Plot(tmp_path / "folder.png").save()


def test_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"mlx-sleep\[plot\]"):
        output.Plot(tmp_path / "plot.png")
