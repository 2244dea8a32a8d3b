"""The Metal kernels: what they ask of a GPU, counted, or on a Mac how long they take.

`mlx-sleep bench kernels`. Counts are of bytes as the threads ask for them, before any cache; they
hold on every Apple GPU and need none. Where there is Metal nothing counts, and the kernels are
timed instead (`timed_rows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from unittest import mock

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm

from ..errors import UserError
from ..files import explained
from ..kernels import conv, gated_delta, harness, ssd
from ..ops.conv import short_conv
from ..ops.gated_delta import gated_delta_chunk, gated_delta_mlx
from ..ops.ssd import ssd_chunk
from . import clock, device, interleave, ratio

DIMS = ((128, 128), (96, 256))  # Dk, Dv of Qwen3-Next and of Jet-Nemotron
STEP = 32  # tokens: a multiple of every kernel's chunk


def rows(tokens: int = 2048) -> Iterator[dict]:
    """One row after the other, each for one head of float32, or `timed_rows` where there is Metal.

    kernel           as in kernels/, or mlx-lm's for comparison, or a gradient by arrays, of which
                     only the memory is known
    dims             [Dk, Dv], or [channels, taps]
    device_bytes     read and written
    least_bytes      every input read once and every output written once
    ratio_to_least   device_bytes over least_bytes
    ratio_to_mlx_lm  device_bytes over those of mlx-lm's generic kernel; None where it has none
    barriers         threadgroup barriers, over all threadgroups
    simd_ops         reductions, shuffles and matrix operations of SIMD groups
    launches         kernel launches
    buffer_bytes     memory beside the inputs: of kernels the outputs of all launches, and of
                     gradients the results; of the others the peak of `mx.get_peak_memory`
    ratio_to_mlx     buffer_bytes over those of MLX's own gradient; None but for gradients

    Long prompts are counted at three short lengths, 32 tokens apart: counts grow by the same
    number with every 32 tokens, or RuntimeError is raised. UserError where there is no compiler.
    """
    if mx.metal.is_available():
        yield from timed_rows(tokens)
        return
    if harness.compiler() is None:
        raise UserError("counting the kernels needs a C++ compiler: install g++ or clang++")
    for dims in DIMS:
        generic = _count("mlx-lm generic", dims, tokens, _mlx_lm(packed=False), _inputs)
        ours = _count("gated_delta_prefill", dims, tokens, gated_delta.prefill, _inputs)
        yield _row(ours, generic)
        yield _row(generic, generic)
        if dims[0] == 128 and hasattr(mlx_lm, "_make_gated_delta_packed_kernel"):
            packed = _mlx_lm(packed=True)
            yield _row(_count("mlx-lm packed", dims, tokens, packed, _inputs), generic)
    for dims in DIMS:
        yield _row(_count("gated_delta_step", dims, 1, gated_delta.step, _step_inputs))
    theirs = _memory("mlx.fast gradient", DIMS[0], tokens, gated_delta_mlx)
    ours = _count("gated_delta_backward", DIMS[0], tokens, gated_delta.backward, _backward_inputs)
    yield _row(ours, mlx=theirs)
    yield _row(theirs, mlx=theirs)
    for name, op in (("mlx-lm", _mlx_lm_ops), ("array path", gated_delta_chunk)):
        yield _row(_memory(f"{name} gradient", DIMS[0], tokens, op), mlx=theirs)
    yield _row(_count("ssd_prefill", DIMS[0], tokens, ssd.prefill, _inputs))
    yield _row(_count("ssd_backward", DIMS[0], tokens, ssd.backward, _backward_inputs))
    yield _row(_count("ssd_step", DIMS[0], 1, ssd.step, _ssd_step_inputs))
    for name, run in (("conv_forward", conv.forward), ("conv_backward", conv.backward)):
        yield _row(_count(name, (64, 4), tokens, run, _conv_inputs(run is conv.backward)))


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
            (mx.abs(x - y).max() / mx.maximum(mx.abs(y).max(), 1e-30)).item()
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


def report(rows: list[dict], file: Path) -> None:
    """The rows as Markdown, with date and device, for `kernels/REPORT.md` or to be sent back.

    UserError where the file can't be written.
    """
    names = list(rows[0])
    lines = [
        "# The Metal kernels, " + ("timed" if "ms" in names else "counted"),
        "",
        f"{datetime.now(timezone.utc):%Y-%m-%d}, {device()}. "
        + (
            "Written by `mlx-sleep bench kernels --report`."
            if "ms" in names
            else "Counted by the harness on that machine; no GPU ran them. One head, float32; "
            "written by `mlx-sleep bench kernels --report`, whose `--help` and whose source "
            "(`mlx_sleep/bench/kernels.py`) say what each column is."
        ),
        "",
        "| " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|" + "|".join(" --- " if isinstance(rows[0][n], str) else " ---: " for n in names) + "|",
    ]
    lines += ["| " + " | ".join(map(_cell, row.values())) + " |" for row in rows]
    with explained(f"cannot write {file}", "name another file with --report"):
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


def _count(kernel: str, dims, tokens: int, run: Callable, inputs: Inputs) -> dict:
    """The counts of run(*inputs(tokens, *dims)), on from short prompts where it is long."""

    def at(T: int) -> dict[str, int]:
        arrays = inputs(T, *dims)
        with harness.launches() as launches:
            outputs = run(*arrays)
            mx.eval(outputs)
        total = {
            name: sum(launch.counts[name] for launch in launches)
            for name in ("device_read", "device_written", "barriers", "simd_ops")
        }
        results = sum(x.nbytes for x in outputs)
        least = results + sum(x.nbytes for x in arrays if isinstance(x, mx.array))
        buffers = sum(launch.output_bytes for launch in launches)
        if len(launches) > 1:  # what lies between launches, and what is made of the last one's
            buffers += results
        more = {"least_bytes": least, "launches": len(launches), "buffer_bytes": buffers}
        return total | more

    steps, rest = divmod(tokens, STEP)
    if steps <= 3:
        counts = at(tokens)
    else:
        first, second, third = (at(n * STEP + rest) for n in (1, 2, 3))
        counts = {name: first[name] + (steps - 1) * (second[name] - first[name]) for name in first}
        if any(third[n] - second[n] != second[n] - first[n] for n in first):
            raise RuntimeError(f"the counts of {kernel} are not linear in the number of tokens")
    return {"kernel": kernel, "dims": list(dims), "tokens": tokens, **counts}


def _row(counts: dict, generic: dict | None = None, mlx: dict | None = None) -> dict:
    """What `rows` documents, in that order."""
    row = {name: counts[name] for name in ("kernel", "dims", "tokens")}
    moved = _moved(counts)
    least = counts.get("least_bytes")
    row["device_bytes"] = moved
    row["least_bytes"] = least
    row["ratio_to_least"] = None if moved is None else moved / least
    row["ratio_to_mlx_lm"] = None if generic is None else moved / _moved(generic)
    row |= {name: counts.get(name) for name in ("barriers", "simd_ops", "launches", "buffer_bytes")}
    row["ratio_to_mlx"] = None if mlx is None else row["buffer_bytes"] / mlx["buffer_bytes"]
    return row


def _moved(counts: dict) -> int | None:
    return counts["device_read"] + counts["device_written"] if "device_read" in counts else None


def _memory(kernel: str, dims, tokens: int, op: Callable) -> dict:
    """Peak memory of the gradients of op in all its inputs, beside those."""
    gradients = _gradients(op)
    inputs = _backward_inputs(tokens, *dims)
    mx.eval(inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(*inputs))
    peak = mx.get_peak_memory() - before
    mx.clear_cache()  # a loop over 2048 steps has freed gigabytes, which MLX would keep
    return {"kernel": kernel, "dims": list(dims), "tokens": tokens, "buffer_bytes": peak}


def _gradients(op: Callable) -> Callable:
    """Of (q, k, v, g, beta, state, d_o, d_state), as the backward kernels take them."""
    return lambda *args: mx.vjp(op, args[:6], args[6:])[1]


def _mlx_lm(packed: bool) -> Callable:
    """mlx-lm's kernel, taken from the installed package, in the harness."""
    with (
        mock.patch.object(mx.metal, "is_available", lambda: True),
        mock.patch.object(mx.fast, "metal_kernel", harness.metal_kernel),
    ):
        make = "_make_gated_delta_packed_kernel" if packed else "_make_gated_delta_kernel"
        kernel = getattr(mlx_lm, make)()

    def run(q, k, v, g, beta, state):
        T, Dk, Dv = q.shape[1], q.shape[3], v.shape[3]
        return kernel(
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

    return run


def _mlx_lm_ops(q, k, v, g, beta, state):
    return mlx_lm.gated_delta_ops(q, k, v, mx.exp(g), beta, state)


def _mlx_lm_metal(q, k, v, g, beta, state):
    return mlx_lm.gated_delta_kernel(q, k, v, mx.exp(g), beta, state)


def _pairs(tokens: int, heads: int) -> Iterator[tuple]:
    """(kernel, dims, tokens, ours, against, theirs, inputs)"""
    for dims in DIMS:
        inputs = _inputs(tokens, *dims, heads)
        prefill = "gated_delta_prefill", dims, tokens, gated_delta.prefill
        yield *prefill, "mlx.fast", gated_delta_mlx, inputs
        if mx.metal.is_available() and dims[0] % 32 == 0:
            yield *prefill, "mlx-lm", _mlx_lm_metal, inputs
    dims = DIMS[0]
    inputs = _backward_inputs(tokens, *dims, heads)
    ours = "gated_delta_backward", dims, tokens, gated_delta.backward
    yield *ours, "mlx.fast", _gradients(gated_delta_mlx), inputs
    yield *ours, "arrays", _gradients(gated_delta_chunk), inputs
    inputs = _inputs(tokens, *dims, heads)
    yield "ssd_prefill", dims, tokens, ssd.prefill, "arrays", ssd_chunk, inputs
    inputs = _backward_inputs(tokens, *dims, heads)
    yield "ssd_backward", dims, tokens, ssd.backward, "arrays", _gradients(ssd_chunk), inputs
    x = _conv_inputs(False)(tokens, 64 * heads, 4)
    yield "conv_forward", (64 * heads, 4), tokens, conv.forward, "arrays", short_conv, x


def _random(*shapes) -> list[mx.array]:
    return [mx.random.normal(shape) for shape in shapes]


def _inputs(T: int, Dk: int, Dv: int, H: int = 1) -> list[mx.array]:
    q, k, v, state = _random((1, T, H, Dk), (1, T, H, Dk), (1, T, H, Dv), (1, H, Dv, Dk))
    k = k / mx.linalg.norm(k, axis=-1, keepdims=True)
    g = -0.1 * mx.random.uniform(shape=(1, T, H))
    return [q, k, v, g, mx.random.uniform(shape=(1, T, H)), state]


def _backward_inputs(T: int, Dk: int, Dv: int, H: int = 1) -> list[mx.array]:
    """With gradients of o and of the last state behind them."""
    return [*_inputs(T, Dk, Dv, H), *_random((1, T, H, Dv), (1, H, Dv, Dk))]


def _step_inputs(_T: int, Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1, Dv), (1, 2), (1, K - 1, C), (C, K), (1,), (1,), (Dv,)
    return [*_random(*shapes), 1e-6, *_random((1, 1, Dv, Dk)), 1]


def _ssd_step_inputs(_T: int, Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1), (1, K - 1, C), (C, K), (C,), (1,), (1,), (1,), (1, 1, Dv, Dk)
    return [*_random(*shapes), 1, (0.0, float("inf"))]


def _conv_inputs(backward: bool) -> Inputs:
    def inputs(T: int, C: int, K: int) -> list:
        shapes = (1, T, C), (C, K), (1, K - 1, C)
        return _random(*shapes, *(shapes[::2] if backward else ()))

    return inputs


def plot(rows: list[dict], axes) -> None:
    """A bar for each row: device bytes over the least possible, or on a Mac the times' ratio."""
    what = "ratio" if "ratio" in rows[0] else "ratio_to_least"
    rows = [row for row in rows if row[what] is not None]
    names = [f"{r['kernel']} {'x'.join(map(str, r['dims']))}" for r in rows]
    axes.barh(range(len(rows)), [r[what] for r in rows], tick_label=names)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel(
        "their time over ours" if what == "ratio" else "device bytes over the least possible"
    )
