"""`mlx-sleep bench kernels`: the targets that can be counted without a GPU."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import pytest

from mlx_sleep.bench import kernels
from mlx_sleep.kernels import harness

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.skipif(
    mx.metal.is_available() or harness.compiler() is None,
    reason="the harness counts where there is a C++ compiler and no Metal",
)


def test_targets():
    rows = list(kernels.rows(tokens=32))
    assert all(list(row) == list(rows[0]) for row in rows)
    by_name = {(row["kernel"], tuple(row["dims"])): row for row in rows}
    prefill = by_name["gated_delta_prefill", (128, 128)]
    assert prefill["ratio_to_least"] <= 1.3
    assert prefill["ratio_to_mlx_lm"] <= 0.1
    for dims in kernels.DIMS:
        step = by_name["gated_delta_step", dims]
        assert step["launches"] == 1 and step["ratio_to_least"] == pytest.approx(1, abs=0.01)
    assert by_name["mlx-lm generic", (128, 128)]["ratio_to_mlx_lm"] == 1
