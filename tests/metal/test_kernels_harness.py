"""The harness that runs Metal kernels as C++: on code we did not write, then on broken kernels."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import importlib

import mlx.core as mx
import numpy as np
import pytest

from tests.ops_reference import error

from . import harness

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.skipif(
    harness.compiler() is None, reason="no C++ compiler: install g++ or clang++"
)


@pytest.fixture(scope="module")
def mlx_lm():
    """mlx-lm's model files, loaded as if Metal were here, with the harness in Metal's place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", harness.metal_kernel)
        names = "mlx_lm.models.gated_delta", "mlx_lm.models.ssm"
        modules = [importlib.reload(importlib.import_module(name)) for name in names]
        assert modules[0]._gated_delta_kernel is not None
    yield modules
    for module in modules:
        importlib.reload(module)


ORDERS = {"forward": 0, "backward": -1, "random": 12345}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ("generic", "masked", "vector", "vector masked", "packed"))
def test_gated_delta_of_mlx_lm(rng, mlx_lm, kind, order):
    module, _ = mlx_lm
    if kind == "packed" and not hasattr(module, "_gated_delta_kernel_packed"):
        pytest.skip("this mlx-lm has no packed kernel")
    B, T, Hk, Hv, Dk, Dv = 2, 5, 1, 2, 128 if kind == "packed" else 64, 32
    q, k = (mx.array(rng.standard_normal((B, T, Hk, Dk)) / Dk**0.5, mx.float32) for _ in "qk")
    v = mx.array(rng.standard_normal((B, T, Hv, Dv)), mx.float32)
    gates = (B, T, Hv, Dk) if "vector" in kind else (B, T, Hv)
    g = mx.array(rng.uniform(0.5, 1, gates), mx.float32)
    beta = mx.array(rng.uniform(0, 1, (B, T, Hv)), mx.float32)
    state = mx.array(rng.standard_normal((B, Hv, Dv, Dk)), mx.float32)
    mask = mx.array(np.arange(T) < [[T], [3]]) if "masked" in kind else None
    # All lanes of the masked kernel write the 0 of a padded position.
    with harness.launches(ORDERS[order], lanes_may_collide=mask is not None) as launches:
        o, final = module.gated_delta_kernel(q, k, v, g, beta, state, mask)
    expected, expected_final = module.gated_delta_ops(q, k, v, g, beta, state, mask)
    if mask is not None:  # the kernel writes 0 at padding
        expected = mx.where(mask[..., None, None], expected, 0)
    assert error(o, np.array(expected)) <= 2e-6
    assert error(final, np.array(expected_final)) <= 2e-6

    (launch,) = launches
    assert ("packed" in launch.name) == (kind == "packed")
    counts = launch.counts
    if mask is None:
        assert counts["device_written"] == 4 * (o.size + final.size)
    # Two reductions a row and token, or four shuffles for eight rows.
    rows = B * T * Hv * Dv if mask is None else (T + 3) * Hv * Dv
    assert counts["simd_ops"] == (rows // 2 if kind == "packed" else 2 * rows)
    assert counts["barriers"] == counts["threadgroup_read"] == 0


@pytest.mark.parametrize("dtype", (mx.float16, mx.bfloat16))
def test_half_types_as_metal_rounds_them(rng, mlx_lm, dtype):
    module, _ = mlx_lm
    shape = (1, 4, 2, 32)
    q, k, v = (mx.array(rng.standard_normal(shape) / 6, mx.float32).astype(dtype) for _ in "qkv")
    g, beta = (mx.array(rng.uniform(0.5, 1, shape[:3]), mx.float32) for _ in "gb")
    state = mx.array(rng.standard_normal((1, 2, 32, 32)), mx.float32)
    o, final = module.gated_delta_kernel(q, k, v, g, beta, state)
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    expected, expected_final = module.gated_delta_ops(q, k, v, g, beta, state)
    assert o.dtype == dtype
    assert mx.array_equal(o, expected.astype(dtype)) or error(o.astype(mx.float32), expected) < 0.01
    assert error(final, np.array(expected_final)) <= 2e-6


def test_ssm_step_of_mlx_lm(rng, mlx_lm):
    _, module = mlx_lm
    B, H, G, P, N = 2, 4, 2, 16, 32
    x = mx.array(rng.standard_normal((B, 1, H, P)), mx.float32)
    b, c = (mx.array(rng.standard_normal((B, 1, G, N)), mx.float32) for _ in "bc")
    A_log, D, bias = (mx.array(rng.uniform(0, 1, H), mx.float32) for _ in "ADb")
    dt = mx.array(rng.standard_normal((B, 1, H)), mx.float32)
    state = mx.array(rng.standard_normal((B, H, P, N)), mx.float32)
    args = x, A_log, b, c, D, dt, bias, state
    o, final = module.ssm_update_kernel(*args, (0.001, 100.0))
    expected, expected_final = module.ssm_attn(*args)
    assert error(o, np.array(expected)) <= 5e-6
    assert error(final, np.array(expected_final)) <= 5e-6


def run(source, x=(1.0,) * 64, size=64, threads=64, grid=None, order=0, header=""):
    """One output `y` [size] from one input `x`."""
    kernel = harness.metal_kernel("broken", ["x"], ["y"], source, header)
    with harness.launches(order) as launches:
        (y,) = kernel(
            inputs=[mx.array(x, mx.float32)],
            output_shapes=[(size,)],
            output_dtypes=[mx.float32],
            grid=(grid or threads, 1, 1),
            threadgroup=(threads, 1, 1),
        )
    return np.array(y), launches[0].counts


SHARED = "threadgroup float s[64]; uint i = thread_position_in_threadgroup.x;"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
GOOD = f"{SHARED} s[i] = x[i]; {BARRIER} y[i] = s[63 - i];"

BROKEN = {
    "threadgroup memory not written": (f"{SHARED} y[i] = s[i];", "uninitialised"),
    "half of it not written": (
        f"{SHARED} if (i < 32) s[i] = x[i]; {BARRIER} y[i] = s[i];",
        "uninitialised",
    ),
    "output read first": (f"{SHARED} y[i] = y[i] + x[i];", "uninitialised"),
    "read past the end": (f"{SHARED} y[i] = x[i + 1];", "out of bounds"),
    "read before the start": (f"{SHARED} y[i] = x[int(i) - 1];", "out of bounds"),
    "write past the end": (f"{SHARED} y[i + 1] = x[i];", "out of bounds"),
    "far out of bounds": (f"{SHARED} y[i] = x[i + (1 << 30)];", "out of bounds"),
    "threadgroup array too short": (
        f"threadgroup float t[8]; {SHARED} t[i] = x[i]; y[i] = t[i];",
        "out of bounds",
    ),
    "private array too short": (
        f"{SHARED} float p[4]; for (int j = 0; j <= 4; ++j) p[j] = x[i]; y[i] = p[i % 4];",
        "out of bounds",
    ),
    "write to an input": (f"{SHARED} ((device float*)x)[i] = 1; y[i] = 0;", "write to input"),
    "barrier in a branch": (f"{SHARED} s[i] = x[i]; if (i < 8) {BARRIER} y[i] = s[i];", "diverg"),
    "barrier after a return": (f"{SHARED} if (i == 3) return; {BARRIER} y[i] = 0;", "divergence"),
    "two barriers": (
        f"{SHARED} if (i < 8) {{ {BARRIER}\n}} else {{ {BARRIER}\n}} y[i] = 0;".replace(
            "else", "\nelse"
        ),
        "divergence",
    ),
    "reduction in a branch": (f"{SHARED} if (i < 8) y[0] = simd_sum(x[i]);", "divergence"),
    "two write one address": (f"{SHARED} s[0] = x[i]; {BARRIER} y[i] = s[0];", "race: write"),
    "two write one output": (f"{SHARED} y[i / 2] = x[i]; y[63 - i] = x[i];", "race: write"),
    "no barrier before the read": (f"{SHARED} s[i] = x[i]; y[i] = s[63 - i];", "race|uninit"),
    "no barrier before the next write": (
        f"{SHARED} s[i] = x[i]; {BARRIER} float a = s[63 - i]; s[i] = a; y[i] = a;",
        "race",
    ),
    "wrong kind of barrier": (
        f"{SHARED} s[i] = x[i]; threadgroup_barrier(mem_flags::mem_device); y[i] = s[63 - i];",
        "race: read",
    ),
    "barrier of one SIMD group only": (
        f"{SHARED} s[i] = x[i]; simdgroup_barrier(mem_flags::mem_threadgroup); y[i] = s[63 - i];",
        "race|uninit",
    ),
    "output not written": (f"{SHARED} if (i != 5) y[i] = x[i];", "unwritten: 4 of 256 bytes"),
    "too much threadgroup memory": (
        f"threadgroup float t[8192]; {SHARED} s[i] = t[i] = x[i]; y[i] = 0;",
        "32 KiB",
    ),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("what", BROKEN)
def test_broken_kernels_are_caught(what, order):
    source, message = BROKEN[what]
    with pytest.raises(harness.KernelError, match=message):
        run(source, order=ORDERS[order])


def test_threadgroups_do_not_share_an_output():
    source = "y[thread_position_in_threadgroup.x] = x[thread_position_in_threadgroup.x];"
    with pytest.raises(harness.KernelError, match="race: write"):
        run(source, grid=128)


@pytest.mark.parametrize("order", ORDERS)
def test_a_good_kernel_and_its_counts(rng, order):
    x = rng.standard_normal(64)
    y, counts = run(GOOD, x, order=ORDERS[order])
    assert np.array_equal(y, x[::-1].astype(np.float32))
    assert counts == {
        "device_read": 256,
        "device_written": 256,
        "threadgroup_read": 256,
        "threadgroup_written": 256,
        "threadgroup_memory": 256,
        "barriers": 1,
        "simdgroup_barriers": 0,
        "simd_ops": 0,
        "multiply_adds": 0,
        "matrix_loads": 0,
        "matrix_products": 0,
    }


@pytest.mark.parametrize(
    "expression", ("x4[i]", "2.0f * x4[i]", "x4[i] * 2.0f + x4[i]", "float4(dot(x4[i], x4[i]))")
)
def test_vectors_are_watched(expression):
    source = f"""
        uint i = thread_position_in_threadgroup.x;
        const device float4* x4 = (const device float4*)x;
        device float4* y4 = (device float4*)y;
        y4[i] = {expression};"""
    _, counts = run(source, threads=16)
    assert counts["device_read"] == counts["device_written"] == 256
    with pytest.raises(harness.KernelError, match="out of bounds"):
        run(source.replace("x4[i]", "x4[i + 1]"), threads=16)


def test_the_message_names_thread_and_place():
    with pytest.raises(harness.KernelError, match=r"byte 256 of buffer 0.*thread \(63, 0, 0\)"):
        run(f"{SHARED} y[i] = x[i + 1];")


def test_a_kernel_that_does_not_compile():
    with pytest.raises(RuntimeError, match="does not compile"):
        run("y[0] = undefined;")


def test_the_grid_is_cut_at_its_edge():
    source = """
        uint i = thread_position_in_grid.x;
        y[i] = threadgroup_position_in_grid.x * 100 + threads_per_threadgroup.x;"""
    y, _ = run(source, size=70, grid=70, threads=32)
    assert list(y) == [32] * 32 + [132] * 32 + [206] * 6


def test_simd_functions(rng):
    x = rng.standard_normal(64).astype(np.float32)
    two = x.reshape(2, 32)
    lane = np.arange(32)
    cases = {
        "simd_sum(v)": two.sum(1, keepdims=True),
        "simd_max(v)": two.max(1, keepdims=True),
        "simd_min(v)": two.min(1, keepdims=True),
        "simd_broadcast(v, 7)": two[:, 7:8],
        "simd_shuffle(v, 31 - lane)": two[:, ::-1],
        "simd_shuffle_xor(v, 5)": two[:, lane ^ 5],
    }
    for call, expected in cases.items():
        y, _ = run(
            f"""
            uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup;
            float v = x[i];
            y[i] = {call};""",
            x,
        )
        assert np.allclose(y.reshape(2, 32), np.broadcast_to(expected, (2, 32)), atol=1e-5), call


def test_simdgroup_matrices(rng):
    """y = A B^T + 2 I with A and B taken out of wider arrays, and A B through a diagonal."""
    x = rng.standard_normal((8, 32)).astype(np.float32)
    source = """
        simdgroup_float8x8 a, b, d(2.0f);
        simdgroup_load(a, x + 3, 32);
        simdgroup_load(b, x, 32, ulong2(11, 0), true);
        simdgroup_multiply_accumulate(d, a, b, d);
        simdgroup_store(d, y, 8);"""
    y, counts = run(source, x.ravel(), threads=32)
    expected = x[:, 3:11] @ x[:, 11:19].T + 2 * np.eye(8)
    assert np.abs(y.reshape(8, 8) - expected).max() < 1e-5
    assert counts["device_read"] == 2 * 256 and counts["multiply_adds"] == 512
    assert counts["simd_ops"] == 4


def test_half_conversion_is_exact():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    for dtype, values in (
        (mx.float16, every.astype(np.float32)),
        (mx.bfloat16, (np.arange(65536, dtype=np.uint32) << 16).view(np.float32)),
    ):
        values = values[np.abs(values) < 1e38]  # not NaN
        # also halfway between neighbours, where rounding to even decides
        values = np.concatenate([values, (values[1:] + values[:-1]) / 2, values * 1.0001])
        kernel = harness.metal_kernel(
            "convert", ["x"], ["y"], "uint i = thread_position_in_grid.x; y[i] = x[i];"
        )
        (y,) = kernel(
            inputs=[mx.array(values)],
            output_shapes=[values.shape],
            output_dtypes=[dtype],
            grid=(len(values), 1, 1),
            threadgroup=(256, 1, 1),
        )
        if dtype == mx.float16:
            with np.errstate(over="ignore"):
                expected = values.astype(np.float16)
            assert np.array_equal(np.array(y), expected)
        else:
            expected = mx.array(values).astype(mx.bfloat16)
            same = np.array(y.view(mx.uint16)) == np.array(expected.view(mx.uint16))
            assert same.all()
