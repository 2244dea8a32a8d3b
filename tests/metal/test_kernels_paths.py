"""Which path an op takes, and that the forced Metal path is the op, with its gradients."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.cli import doctor
from mlx_sleep.kernels import source
from mlx_sleep.ops import paths, verdicts
from mlx_sleep.ops.gated_delta import gated_delta
from mlx_sleep.ops.paths import VARIABLE
from mlx_sleep.ops.paths import path as path_of
from mlx_sleep.ops.ssd import ssd
from mlx_sleep.utils.errors import UserError
from tests.ops_reference import arrays, assert_close, assert_gradients, draw, reference

assert mlx_sleep  # imported for its effect
OPS = {"gated_delta": gated_delta, "ssd": ssd}


def path(op, tokens, heads):
    return path_of(verdicts.Shape(op, "token" if tokens == 1 else "prompt", heads, ()))


@pytest.mark.parametrize("op", OPS)
def test_the_variable(monkeypatch, op):
    monkeypatch.setenv(VARIABLE, "array")
    assert [path(op, T, (2, 4, 128, 128)) for T in (1, 9)] == ["step", "chunk"]
    monkeypatch.delenv(VARIABLE)
    usual = [path(op, T, (2, 4, 33, 128)) for T in (1, 9)]
    assert "metal" not in usual
    monkeypatch.setenv(VARIABLE, "metal")
    assert [path(op, T, (2, 4, 96, 256)) for T in (1, 9)] == ["metal", "metal"]
    assert [path(op, T, (2, 4, 33, 128)) for T in (1, 9)] == usual  # heads that no kernel takes
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(UserError, match="metal or array"):
        path(op, 1, (2, 4, 128, 128))


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a Metal GPU")
def test_metal_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setenv(VARIABLE, "metal")
    monkeypatch.setattr(source, "without_metal", None)
    with pytest.raises(UserError, match="MLX_SLEEP_KERNELS=metal needs a Metal GPU"):
        path("gated_delta", 1, (2, 4, 128, 128))
    with pytest.raises(UserError, match="need a Metal GPU"):
        source.build(source.read("conv.metal")["conv_forward"])


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """What `paths` sees of a Mac with a GPU and no verdicts. Arrays stay where they are."""
    monkeypatch.delenv(VARIABLE, raising=False)
    store = verdicts.Verdicts(tmp_path / "verdicts.json", "here")
    monkeypatch.setattr(paths, "verdicts", lambda: store)
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))


def test_mlx_takes_only_the_heads_that_it_has_kernels_for(a_gpu, monkeypatch):
    qwen3_next = (16, 32, 128, 128)
    assert [path("gated_delta", T, qwen3_next) for T in (1, 9)] == ["mlx.fast"] * 2
    for heads in ((2, 2, 64, 64), (6, 6, 96, 256), (16, 48, 128, 64), (4, 4, 128, 128)):
        assert [path("gated_delta", T, heads) for T in (1, 9)] == ["step", "chunk"]
    assert [path("ssd", T, qwen3_next) for T in (1, 9)] == ["step", "chunk"]
    monkeypatch.setenv(VARIABLE, "array")
    assert path("gated_delta", 9, qwen3_next) == "chunk"
    monkeypatch.setenv(VARIABLE, "metal")
    assert path("gated_delta", 9, qwen3_next) == path("ssd", 9, (1, 1, 64, 64)) == "metal"


def test_only_the_gpu_is_metal(a_gpu, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert path("gated_delta", 9, (16, 16, 128, 128)) == "chunk"


@pytest.mark.parametrize("heads, fast", (((16, 16), True), ((1, 2), False)))
@pytest.mark.parametrize("dtype", (mx.float32, mx.bfloat16))
def test_the_op_takes_mlx_where_it_has_kernels(a_gpu, monkeypatch, rng, heads, fast, dtype):
    """Also with a mask, of which MLX hears nothing, and decays that bfloat16 would round to 1."""
    calls = []
    update = mx.fast.gated_delta_update

    def spy(q, k, v, decay, *rest):
        assert {x.dtype for x in (q, k, v, decay)} == {mx.float32} and len(rest) == 2
        calls.append(decay)
        return update(q, k, v, decay, *rest)

    monkeypatch.setattr(mx.fast, "gated_delta_update", spy)
    inputs = draw(rng, B=1, T=9, Hk=heads[0], Hv=heads[1], Dk=128, Dv=128, g=-4e-4, beta=0.5)
    mask = np.arange(9) < [[7]]
    low = [*arrays(inputs[:3], dtype), *arrays(inputs[3:])]
    o, state = gated_delta(*low, mask=mx.array(mask))
    exact = [np.array(x.astype(mx.float32), np.float64) for x in low]
    expected, expected_state = reference("gated_delta", *exact, mask)
    assert bool(calls) == fast and o.dtype == dtype
    assert_close([state], [expected_state], 2e-6)
    real = mx.where(mx.array(mask)[..., None, None], o, 0).astype(mx.float32)
    assert_close([real], [expected], 2e-6 if dtype == mx.float32 else 2**-8)


def test_doctor_says_where_heads_go_that_no_kernel_takes(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    usual = path("gated_delta", 256, (2, 4, 20, 20))
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
