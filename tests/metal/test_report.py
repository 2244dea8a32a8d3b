"""`make kernel-report`: the targets that can be counted without a GPU; `bench kernels` on none."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import json

import mlx.core as mx
import pytest

from mlx_sleep.kernels import conv, gated_delta, ssd
from mlx_sleep.lab.bench import kernels
from mlx_sleep.utils.errors import UserError

from . import decode, harness, report

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.skipif(
    mx.metal.is_available() or harness.compiler() is None,
    reason="the harness counts where there is a C++ compiler and no Metal",
)
SMALL = (32, 32)


def test_targets():
    rows = list(report.rows(tokens=32))
    assert all(list(row) == list(rows[0]) for row in rows)
    by_name = {(row["kernel"], tuple(row["dims"])): row for row in rows}
    prefill = by_name["gated_delta_prefill", (128, 128)]
    assert prefill["ratio_to_least"] == 1
    assert prefill["ratio_to_mlx_lm"] <= 0.1
    for rule in ("gated_delta", "ssd"):
        assert by_name[f"{rule}_backward", (128, 128)]["ratio_to_least"] <= 4
    for dims in kernels.DIMS:
        step = by_name["gated_delta_step", dims]
        assert step["launches"] == 1 and step["ratio_to_least"] == pytest.approx(1, abs=0.01)
    assert by_name["mlx-lm generic", (128, 128)]["ratio_to_mlx_lm"] == 1


@pytest.mark.parametrize("tokens", (128, 141))
@pytest.mark.parametrize(
    "run", (gated_delta.prefill, gated_delta.backward, ssd.backward, conv.backward)
)
def test_long_prompts_are_counted_from_short_ones(monkeypatch, run, tokens):
    if run is conv.backward:
        inputs, dims = kernels.conv_inputs(True), (6, 4)
    else:
        backward = run is not gated_delta.prefill
        inputs, dims = kernels.backward_inputs if backward else kernels.rule_inputs, SMALL
    quick = report._count("x", dims, tokens, run, inputs)
    monkeypatch.setattr(report, "STEP", 1000)
    assert quick == report._count("x", dims, tokens, run, inputs)


def test_counts_that_are_not_linear():
    def run(q, k, v, g, beta, state):
        many = 2 if q.shape[1] == 96 else 1
        return [x for _ in range(many) for x in ssd.prefill(q, k, v, g, beta, state)]

    with pytest.raises(RuntimeError, match="not linear"):
        report._count("x", SMALL, 256, run, kernels.rule_inputs)


def test_scratch_of_the_gradient():
    """A state for every 32 tokens and one number for each of v; nothing else beside the results."""
    first, second = (
        report._count("x", SMALL, T, gated_delta.backward, kernels.backward_inputs)
        for T in (64, 128)
    )
    assert second["scratch_bytes"] - first["scratch_bytes"] == 64 // 32 * 4 * 32 * 32 + 64 * 4 * 32
    mlx = report._memory("x", SMALL, 128, kernels.gated_delta_mlx)
    assert second["buffer_bytes"] <= mlx["buffer_bytes"] / 8


def test_launches_of_a_token():
    """Of the embedded model, and of each sleep layer in another: norm, projections, mixer, sum."""
    model = decode.models()["embedded"]
    assert sum(decode.primitives(model, "metal").values()) <= 67
    assert sum(decode.primitives(model, "array").values()) >= 130
    names = [decode.primitives(decode.smollm2(2, layers), "metal") for layers in (1, 2)]
    more = names[1] - names[0]
    assert more == {"Depends": 2, "Matmul": 6, "AddMM": 1, "Multiply": 1, "Add": 1}


def test_timed_rows(monkeypatch):
    """What a Mac runs on its GPU, in the harness, at toy sizes."""
    monkeypatch.setattr(kernels, "DIMS", (SMALL,))
    rows = list(kernels.timed_rows(tokens=5, repeats=1, heads=2))
    assert [row["kernel"] for row in rows] == [
        "gated_delta_prefill",
        "gated_delta_backward",
        "gated_delta_backward",
        "ssd_prefill",
        "ssd_backward",
        "conv_forward",
    ]
    assert all(row["error"] <= 1e-5 and row["ratio"] > 0 for row in rows)


def test_report(monkeypatch, tmp_path, capsys):
    row = {"kernel": "a", "dims": [128, 96], "barriers": 12345, "ratio_to_least": 1.234}
    monkeypatch.setattr(report, "rows", lambda _tokens: iter([row, row | {"barriers": None}]))
    file = tmp_path / "REPORT.md"
    report.main(["--json", "--report", str(file)])
    assert json.loads(capsys.readouterr().out)["rows"][0] == row
    text = file.read_text()
    assert "| a | 128 x 96 | 12,345 | 1.23 |\n| a | 128 x 96 |  | 1.23 |\n" in text
    assert f"mlx {mx.__version__}" in text and "no GPU" in text
    with pytest.raises(UserError, match="--report"):
        kernels.report([row], tmp_path / "no" / "folder.md")


def test_bench_kernels_without_metal(refused):
    error = refused("bench", "kernels")
    assert "needs a Metal GPU" in error and "`make kernel-report`" in error
