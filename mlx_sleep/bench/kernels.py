"""What the Metal kernels ask of a GPU, counted in the harness (`mlx-sleep bench kernels`).

Counts, not times: bytes as the threads ask for them, before any cache. They hold on every Apple
GPU and need none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm

from ..errors import UserError
from ..kernels import conv, gated_delta, harness, ssd

DIMS = ((128, 128), (96, 256))  # Dk, Dv of Qwen3-Next and of Jet-Nemotron


def rows(tokens: int = 2048) -> Iterator[dict]:
    """One row after the other, each for one head of float32.

    kernel           as in kernels/, or mlx-lm's for comparison
    dims             [Dk, Dv], or [channels, taps]
    device_bytes     read and written
    least_bytes      every input read once and every output written once
    ratio_to_least   device_bytes over least_bytes
    ratio_to_mlx_lm  device_bytes over those of mlx-lm's generic kernel; None where it has none
    barriers         threadgroup barriers, over all threadgroups
    simd_ops         reductions, shuffles and matrix operations of SIMD groups
    launches         kernel launches

    UserError where there is Metal (the kernels would run there, where nothing counts) or no C++
    compiler.
    """
    if mx.metal.is_available():
        raise UserError("kernels are counted where there is no Metal: run this on a Linux machine")
    if harness.compiler() is None:
        raise UserError("counting the kernels needs a C++ compiler: install g++ or clang++")
    for dims in DIMS:
        inputs = _inputs(tokens, *dims)
        theirs = _count("", dims, tokens, _mlx_lm(inputs, packed=False))
        ours = _count("gated_delta_prefill", dims, tokens, lambda x=inputs: gated_delta.prefill(*x))
        generic = theirs["device_bytes"]
        yield _against(ours, inputs, generic)
        yield _against(theirs | {"kernel": "mlx-lm generic"}, inputs, generic)
        if dims[0] == 128 and hasattr(mlx_lm, "_make_gated_delta_packed_kernel"):
            packed = _count("mlx-lm packed", dims, tokens, _mlx_lm(inputs, packed=True))
            yield _against(packed, inputs, generic)
    for dims in DIMS:
        yield _row("gated_delta_step", dims, 1, gated_delta.step, _step_inputs(*dims))
    for rule, kernels in (("gated_delta", gated_delta), ("ssd", ssd)):
        inputs = _inputs(tokens, *DIMS[0])
        if rule == "ssd":
            yield _row("ssd_prefill", DIMS[0], tokens, kernels.prefill, inputs)
        gradients = [mx.ones_like(inputs[2]), mx.ones_like(inputs[5])]
        yield _row(f"{rule}_backward", DIMS[0], tokens, kernels.backward, inputs + gradients)
    yield _row("ssd_step", DIMS[0], 1, ssd.step, _ssd_step_inputs(*DIMS[0]))
    x = _random((1, tokens, 64), (64, 4), (1, 3, 64))
    yield _row("conv_forward", (64, 4), tokens, conv.forward, x)
    yield _row("conv_backward", (64, 4), tokens, conv.backward, [*x, x[0], x[2]])


def _row(kernel: str, dims, tokens: int, run: Callable, inputs: list) -> dict:
    return _against(_count(kernel, dims, tokens, lambda: run(*inputs)), inputs, None)


def _count(kernel: str, dims, tokens: int, run: Callable) -> dict:
    with harness.launches() as launches:
        outputs = run()

    def total(*names):
        return sum(launch.counts[name] for launch in launches for name in names)

    return {
        "kernel": kernel,
        "dims": list(dims),
        "tokens": tokens,
        "device_bytes": total("device_read", "device_written"),
        "least_bytes": sum(x.nbytes for x in outputs),  # and the inputs, below
        "barriers": total("barriers"),
        "simd_ops": total("simd_ops"),
        "launches": len(launches),
    }


def _against(row: dict, inputs: list, generic: int | None) -> dict:
    """The row with its inputs' bytes and its ratios, in the order that it is shown in."""
    least = row["least_bytes"] + sum(x.nbytes for x in inputs if isinstance(x, mx.array))
    moved = row["device_bytes"]
    first = {name: row[name] for name in ("kernel", "dims", "tokens", "device_bytes")}
    ratios = {
        "least_bytes": least,
        "ratio_to_least": moved / least,
        "ratio_to_mlx_lm": None if generic is None else moved / generic,
    }
    return first | ratios | {name: row[name] for name in ("barriers", "simd_ops", "launches")}


def _mlx_lm(inputs: list, packed: bool) -> Callable:
    """mlx-lm's kernel on the same inputs, taken from the installed package."""
    with (
        mock.patch.object(mx.metal, "is_available", lambda: True),
        mock.patch.object(mx.fast, "metal_kernel", harness.metal_kernel),
    ):
        make = "_make_gated_delta_packed_kernel" if packed else "_make_gated_delta_kernel"
        kernel = getattr(mlx_lm, make)()
    q, k, v, g, beta, state = inputs
    T, Dk, Dv = q.shape[1], q.shape[3], v.shape[3]
    return lambda: kernel(
        inputs=[q, k, v, mx.exp(g), beta, state, T],
        template=[
            ("InT", q.dtype),
            ("StT", state.dtype),
            ("Dk", Dk),
            ("Dv", Dv),
            ("Hk", 1),
            ("Hv", 1),
        ],
        grid=(32, Dv // 8 if packed else Dv, 1),
        threadgroup=(32, 4, 1),
        output_shapes=[v.shape, state.shape],
        output_dtypes=[v.dtype, state.dtype],
    )


def _random(*shapes) -> list[mx.array]:
    return [mx.random.normal(shape) for shape in shapes]


def _inputs(T: int, Dk: int, Dv: int) -> list[mx.array]:
    q, k, v, state = _random((1, T, 1, Dk), (1, T, 1, Dk), (1, T, 1, Dv), (1, 1, Dv, Dk))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    return [
        q,
        k,
        v,
        -0.1 * mx.random.uniform(shape=(1, T, 1)),
        mx.random.uniform(shape=(1, T, 1)),
        state,
    ]


def _step_inputs(Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1, Dv), (1, 2), (1, K - 1, C), (C, K), (1,), (1,), (Dv,)
    return [*_random(*shapes), 1e-6, *_random((1, 1, Dv, Dk)), 1]


def _ssd_step_inputs(Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1), (1, K - 1, C), (C, K), (C,), (1,), (1,), (1,), (1, 1, Dv, Dk)
    return [*_random(*shapes), 1, (0.0, float("inf"))]


def plot(rows: list[dict], axes) -> None:
    """A bar for each row: device bytes over the least possible."""
    names = [f"{r['kernel']} {'x'.join(map(str, r['dims']))}" for r in rows]
    axes.barh(names, [r["ratio_to_least"] for r in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("device bytes over the least possible")
