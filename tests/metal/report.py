"""Counts what the Metal kernels ask of a GPU, in the harness: `make kernel-report`.

    python -m tests.metal.report [--tokens 2048] [--json] [--report REPORT.md]

Counts are of bytes as the threads ask for them, before any cache; they hold on every Apple GPU and
need none. `ratio_to_least` is the device bytes over the least possible: 1 is the best there is.
"""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import mlx.core as mx
from mlx_lm.models import gated_delta as mlx_lm

from mlx_sleep.cli.output import emit
from mlx_sleep.kernels import conv, delta_attention, gated_delta, source, ssd
from mlx_sleep.lab.bench.kernels import (
    DIMS,
    Inputs,
    backward_inputs,
    conv_inputs,
    gradients_of,
    random_arrays,
    report,
    rule_inputs,
)
from mlx_sleep.ops.gated_delta import gated_delta_chunk, gated_delta_mlx
from mlx_sleep.utils.errors import UserError

from . import decode, harness

assert mlx_sleep  # imported for its effect
STEP = 32  # tokens: a multiple of every kernel's chunk
COUNTED = "device_read device_written barriers simd_ops matrix_loads matrix_products".split()


def rows(tokens: int = 2048) -> Iterator[dict]:
    """One row after the other, each for one head of float32, or for a token of a whole model.

    kernel           as in kernels/, or mlx-lm's for comparison, or a gradient by arrays, of which
                     only the memory is known; or a model and MLX_SLEEP_KERNELS, whose launches
                     `decode` counts
    dims             [Dk, Dv], or [channels, taps]; of a model [layers]
    device_bytes     read and written
    least_bytes      every input read once and every output written once
    ratio_to_least   device_bytes over least_bytes
    ratio_to_mlx_lm  device_bytes over those of mlx-lm's generic kernel; None where it has none
    barriers         threadgroup barriers, over all threadgroups
    simd_ops         reductions, shuffles and matrix operations of SIMD groups
    loads_a_product  8 x 8 operands loaded from memory for each matrix product of SIMD groups
    launches         kernel launches
    scratch_bytes    what launches write that is not part of the results
    buffer_bytes     memory beside the inputs: of kernels the outputs of all launches, and of
                     gradients the results; of the others the peak of `mx.get_peak_memory`
    ratio_to_mlx     buffer_bytes over those of MLX's own gradient; None but for gradients

    Long prompts are counted at three short lengths, 32 tokens apart: counts grow by the same
    number with every 32 tokens, or RuntimeError is raised. UserError where there is no compiler.
    """
    if mx.metal.is_available():
        raise UserError("nothing counts where there is Metal; mlx-sleep bench kernels times there")
    if harness.compiler() is None:
        raise UserError("counting the kernels needs a C++ compiler: install g++ or clang++")
    for dims in DIMS:
        generic = _count("mlx-lm generic", dims, tokens, _mlx_lm(packed=False), rule_inputs)
        ours = _count("gated_delta_prefill", dims, tokens, gated_delta.prefill, rule_inputs)
        yield _row(ours, generic)
        yield _row(generic, generic)
        if dims[0] == 128 and hasattr(mlx_lm, "_make_gated_delta_packed_kernel"):
            packed = _mlx_lm(packed=True)
            yield _row(_count("mlx-lm packed", dims, tokens, packed, rule_inputs), generic)
    for dims in DIMS:
        yield _row(_count("gated_delta_step", dims, 1, gated_delta.step, _step_inputs))
    theirs = _memory("mlx.fast gradient", DIMS[0], tokens, gated_delta_mlx)
    ours = _count("gated_delta_backward", DIMS[0], tokens, gated_delta.backward, backward_inputs)
    yield _row(ours, mlx=theirs)
    yield _row(theirs, mlx=theirs)
    for name, op in (("mlx-lm", _mlx_lm_ops), ("array path", gated_delta_chunk)):
        yield _row(_memory(f"{name} gradient", DIMS[0], tokens, op), mlx=theirs)
    yield _row(_count("ssd_prefill", DIMS[0], tokens, ssd.prefill, rule_inputs))
    yield _row(_count("ssd_backward", DIMS[0], tokens, ssd.backward, backward_inputs))
    yield _row(_count("ssd_step", DIMS[0], 1, ssd.step, _ssd_step_inputs))
    attention = delta_attention.step, _attention_step_inputs
    yield _row(_count("delta_attention_step", (64, 64), 1, *attention))
    for name, model in decode.models().items():
        for kernels in ("array", "metal"):
            launches = sum(decode.primitives(model, kernels).values())
            counts = {"kernel": f"{name}, {kernels}", "dims": [model.num_layers], "tokens": 1}
            yield _row(counts | {"launches": launches})
    for name, run in (("conv_forward", conv.forward), ("conv_backward", conv.backward)):
        yield _row(_count(name, (64, 4), tokens, run, conv_inputs(run is conv.backward)))


def _count(kernel: str, dims, tokens: int, run: Callable, inputs: Inputs) -> dict:
    """The counts of run(*inputs(tokens, *dims)), on from short prompts where it is long."""

    def at(T: int) -> dict[str, int]:
        arrays = inputs(T, *dims)
        with harness.launches() as launches:
            outputs = run(*arrays)
            mx.eval(outputs)
        total = {name: sum(launch.counts[name] for launch in launches) for name in COUNTED}
        results = sum(x.nbytes for x in outputs)
        least = results + sum(x.nbytes for x in arrays if isinstance(x, mx.array))
        buffers = sum(launch.output_bytes for launch in launches)
        more = {"least_bytes": least, "launches": len(launches), "buffer_bytes": buffers}
        more["scratch_bytes"] = buffers - results
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
    row |= {name: counts.get(name) for name in ("barriers", "simd_ops")}
    products = counts.get("matrix_products")
    row["loads_a_product"] = counts["matrix_loads"] / products if products else None
    row |= {name: counts.get(name) for name in ("launches", "scratch_bytes", "buffer_bytes")}
    row["ratio_to_mlx"] = None if mlx is None else row["buffer_bytes"] / mlx["buffer_bytes"]
    return row


def _moved(counts: dict) -> int | None:
    return counts["device_read"] + counts["device_written"] if "device_read" in counts else None


def _memory(kernel: str, dims, tokens: int, op: Callable) -> dict:
    """Peak memory of the gradients of op in all its inputs, beside those."""
    gradients = gradients_of(op)
    inputs = backward_inputs(tokens, *dims)
    mx.eval(inputs)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradients(*inputs))
    peak = mx.get_peak_memory() - before
    mx.clear_cache()  # a loop over 2048 steps has freed gigabytes, which MLX would keep
    return {"kernel": kernel, "dims": list(dims), "tokens": tokens, "buffer_bytes": peak}


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


def _step_inputs(_T: int, Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1, Dv), (1, 2), (1, K - 1, C), (C, K), (1,), (1,), (Dv,)
    return [*random_arrays(*shapes), 1e-6, *random_arrays((1, 1, Dv, Dk)), 1]


def _ssd_step_inputs(_T: int, Dk: int, Dv: int, K: int = 4) -> list:
    C = 2 * Dk + Dv
    shapes = (1, C), (1, 1), (1, K - 1, C), (C, K), (C,), (1,), (1,), (1,), (1, 1, Dv, Dk)
    return [*random_arrays(*shapes), 1, (0.0, float("inf"))]


def _attention_step_inputs(_T: int, D: int, _same: int, K: int = 4) -> list:
    shapes = *[(1, D)] * 3, (1, 1, D), (1, 1), (1, 1), (1, K - 1, 3 * D), (3 * D, K), (1,), (D,)
    return [*random_arrays(*shapes), 1e-6, *random_arrays((1, 1, D, D))]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="kernel-report", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.add_argument("--report", type=Path, help="write the rows as Markdown, with the date")
    args = parser.parse_args(arguments)
    source.without_metal = harness.metal_kernel
    measured = []
    for row in rows(args.tokens):
        measured.append(row)
        if sys.stderr.isatty():
            text = f"\rkernel-report: {len(measured)} rows"
            print(text, end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    emit("kernel-report", measured, args.json)
    if args.report:
        note = (
            "Counted by the harness on that machine; no GPU ran them. One head, float32; written "
            "by `make kernel-report`, whose source (`tests/metal/report.py`) says what each "
            "column is."
        )
        report(measured, args.report, "counted", note)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
