"""Which path an op takes, and that the forced Metal path is the op, with its gradients."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.cli import doctor
from mlx_sleep.kernels import source
from mlx_sleep.ops.gated_delta import gated_delta
from mlx_sleep.ops.paths import VARIABLE, path
from mlx_sleep.ops.ssd import ssd
from mlx_sleep.utils.errors import UserError
from tests.ops_reference import arrays, assert_close, assert_gradients, draw, reference

assert mlx_sleep  # imported for its effect
OPS = {"gated_delta": gated_delta, "ssd": ssd}


@pytest.mark.parametrize("op", OPS)
def test_the_variable(monkeypatch, op):
    monkeypatch.setenv(VARIABLE, "array")
    assert [path(op, T, 128, 128) for T in (1, 9)] == ["step", "chunk"]
    monkeypatch.delenv(VARIABLE)
    usual = [path(op, T, 33, 128) for T in (1, 9)]
    assert "metal" not in usual
    monkeypatch.setenv(VARIABLE, "metal")
    assert [path(op, T, 96, 256) for T in (1, 9)] == ["metal", "metal"]
    assert [path(op, T, 33, 128) for T in (1, 9)] == usual  # heads that no kernel takes
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UserError, match="metal or array"):
        path(op, 1, 128, 128)


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a Metal GPU")
def test_metal_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setenv(VARIABLE, "metal")
    monkeypatch.setattr(source, "without_metal", None)
    with pytest.raises(UserError, match="MLX_SLEEP_KERNELS=metal needs a Metal GPU"):
        path("gated_delta", 1, 128, 128)
    with pytest.raises(UserError, match="need a Metal GPU"):
        source.build(source.read("conv.metal")["conv_forward"])


def test_doctor_says_where_heads_go_that_no_kernel_takes(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    usual = path("gated_delta", 256, 20, 20)
    assert doctor.examine()["odd_heads"] == ""
    monkeypatch.setenv(VARIABLE, "metal")
    report = doctor.examine()
    assert report["odd_heads"] == usual
    assert any(line.endswith(f"others go by {usual}") for line in doctor._lines(report))


@pytest.mark.kernels
@pytest.mark.parametrize("T", (1, 17))
@pytest.mark.parametrize("op", OPS)
def test_the_metal_path(monkeypatch, rng, op, T):
    monkeypatch.setenv(VARIABLE, "metal")
    inputs = draw(rng, T=T, Dk=32, Dv=32)
    assert_close(OPS[op](*arrays(inputs)), reference(op, *inputs), 1e-6)
    assert_gradients(op, OPS[op], rng, inputs, mx.float32, 1e-5, tries=1)


@pytest.mark.kernels
@pytest.mark.parametrize("op", OPS)
def test_the_metal_path_with_a_mask_and_no_state(monkeypatch, rng, op):
    monkeypatch.setenv(VARIABLE, "metal")
    inputs = draw(rng, T=9, Dk=32, Dv=32)
    inputs[5] *= 0
    mask = np.arange(9) < [[9], [4]]
    got = OPS[op](*arrays(inputs[:5]), mask=mx.array(mask))
    assert_close(got, reference(op, *inputs, mask), 1e-6)
