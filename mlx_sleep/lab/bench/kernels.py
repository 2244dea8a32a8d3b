"""The Metal kernels: how long they take on this machine's GPU (`mlx-sleep bench kernels`).

What they ask of any GPU is counted without one, by the tests' harness: `make kernel-report`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm

from ...kernels import conv, gated_delta, ssd
from ...ops.conv import short_conv
from ...ops.gated_delta import gated_delta_chunk, gated_delta_mlx
from ...ops.ssd import ssd_chunk
from ...utils.errors import UserError
from ...utils.files import os_errors_as_user_errors
from ...utils.platform import device
from ..statistics import ratio
from ..timing import clock, interleave

DIMS = ((128, 128), (96, 256))  # Dk, Dv of Qwen3-Next and of Jet-Nemotron


def rows(tokens: int = 2048) -> Iterator[dict]:
    """`timed_rows` with their defaults. UserError where there is no Metal."""
    if not mx.metal.is_available():
        raise UserError(
            "bench kernels needs a Metal GPU, and this machine has none; in a checkout, "
            "`make kernel-report` counts what the kernels ask of one"
        )
    yield from timed_rows(tokens)


def timed_rows(tokens: int = 2048, repeats: int = 5, heads: int = 16) -> Iterator[dict]:
    """One row after the other, in turn with what each kernel is compared to.

    kernel   as in kernels/
    dims     [Dk, Dv], or [channels, taps]
    tokens, heads
    ms       milliseconds a call, the median over rounds
    against  mlx.fast, mlx-lm, or arrays: this package's path without kernels
    ratio    their time over ours; above 1, ours is faster
    error    largest difference between the two, relative to the largest entry, of all results
    """
    for kernel, dims, length, ours, against, theirs, inputs in _pairs(tokens, heads):
        mx.eval(inputs)
        results = [f(*inputs) for f in (ours, theirs)]
        error = max(
            float(mx.abs(x - y).max() / mx.maximum(mx.abs(y).max(), 1e-30))
            for x, y in zip(*results, strict=True)
        )
        times = interleave([clock(f, *inputs) for f in (ours, theirs)], repeats)
        yield {
            "kernel": kernel,
            "dims": list(dims),
            "tokens": length,
            "heads": heads,
            "ms": 1e3 * sorted(times[0])[len(times[0]) // 2],
            "against": against,
            "ratio": ratio(times[1], times[0]),
            "error": error,
        }


def report(rows: list[dict], file: Path, how: str = "timed", note: str = "") -> None:
    """The rows as Markdown, with date and device, for `kernels/REPORT.md` or to be sent back.

    how: what was done to the kernels, for the title. note: how the rows came to be.
    UserError where the file can't be written.
    """
    names = list(rows[0])
    lines = [
        f"# The Metal kernels, {how}",
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {device()}. "
        + (note or "Written by `mlx-sleep bench kernels --report`."),
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|" + "|".join(" --- " if isinstance(rows[0][n], str) else " ---: " for n in names) + "|",
    ]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    with os_errors_as_user_errors(f"cannot write {file}", "name another file with --report"):
        file.write_text("\n".join(lines) + "\n")


def _cell(value) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return " x ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.2g}" if value < 0.1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else value


Inputs = Callable[..., list]  # of tokens, Dk, Dv


def gradients_of(op: Callable) -> Callable:
    """Of (q, k, v, g, beta, state, d_o, d_state), as the backward kernels take them."""
    return lambda *args: mx.vjp(op, [*args[:6]], [*args[6:]])[1]


def _mlx_lm_metal(q, k, v, g, beta, state):
    return mlx_lm.gated_delta_kernel(q, k, v, mx.exp(g), beta, state)


def _pairs(tokens: int, heads: int) -> Iterator[tuple]:
    """(kernel, dims, tokens, ours, against, theirs, inputs)"""
    for dims in DIMS:
        inputs = rule_inputs(tokens, *dims, heads)
        prefill = "gated_delta_prefill", dims, tokens, gated_delta.prefill
        yield *prefill, "mlx.fast", gated_delta_mlx, inputs
        if mx.metal.is_available() and dims[0] % 32 == 0:
            yield *prefill, "mlx-lm", _mlx_lm_metal, inputs
    dims = DIMS[0]
    inputs = backward_inputs(tokens, *dims, heads)
    ours = "gated_delta_backward", dims, tokens, gated_delta.backward
    yield *ours, "mlx.fast", gradients_of(gated_delta_mlx), inputs
    yield *ours, "arrays", gradients_of(gated_delta_chunk), inputs
    inputs = rule_inputs(tokens, *dims, heads)
    yield "ssd_prefill", dims, tokens, ssd.prefill, "arrays", ssd_chunk, inputs
    inputs = backward_inputs(tokens, *dims, heads)
    yield "ssd_backward", dims, tokens, ssd.backward, "arrays", gradients_of(ssd_chunk), inputs
    x = conv_inputs(False)(tokens, 64 * heads, 4)
    yield "conv_forward", (64 * heads, 4), tokens, conv.forward, "arrays", short_conv, x


def random_arrays(*shapes) -> list[mx.array]:
    return [mx.random.normal(shape) for shape in shapes]


def rule_inputs(T: int, Dk: int, Dv: int, H: int = 1) -> list[mx.array]:
    q, k, v, state = random_arrays((1, T, H, Dk), (1, T, H, Dk), (1, T, H, Dv), (1, H, Dv, Dk))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    g = -0.1 * mx.random.uniform(shape=(1, T, H))
    return [q, k, v, g, mx.random.uniform(shape=(1, T, H)), state]


def backward_inputs(T: int, Dk: int, Dv: int, H: int = 1) -> list[mx.array]:
    """The same, followed by gradients of o and of the last state."""
    return [*rule_inputs(T, Dk, Dv, H), *random_arrays((1, T, H, Dv), (1, H, Dv, Dk))]


def conv_inputs(backward: bool) -> Inputs:
    def inputs(T: int, C: int, K: int) -> list:
        shapes = (1, T, C), (C, K), (1, K - 1, C)
        return random_arrays(*shapes, *(shapes[::2] if backward else ()))

    return inputs


def plot(rows: list[dict], axes) -> None:
    """A bar for each row: their time over ours."""
    names = [f"{r['kernel']} {'x'.join(map(str, r['dims']))}" for r in rows]
    axes.barh(range(len(rows)), [r["ratio"] for r in rows], tick_label=names)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("their time over ours")
