"""Runs Metal kernels without a Mac: their own text, compiled as C++, one fiber for each thread.

`metal_kernel` takes what `mx.fast.metal_kernel` takes and returns a callable that is called the
same way. A launch raises `KernelError` for what a GPU would only sometimes punish: a read of
threadgroup memory or of an output that was not written, an access out of bounds, a barrier or
SIMD operation that not all threads reach, two threads at one address (one of them writing) with
no barrier between, an output element that no thread wrote.

It is a checker, not a simulator: it knows nothing of caches, registers, occupancy or time. SIMD
operations must be reached by all lanes together, which Metal does not demand of reductions, and
multiply-adds are counted for matrix products, dot() and fma() only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from contextvars import ContextVar
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from . import build
from .build import compiler

__all__ = ["KernelError", "Launch", "compiler", "launches", "metal_kernel"]

_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.int32: "int",
    mx.uint32: "uint",
    mx.int64: "int64_t",
    mx.float16: "half",
    mx.bfloat16: "bfloat",
    mx.float32: "float",
}
_COUNTS = (
    "device_read",
    "device_written",
    "threadgroup_read",
    "threadgroup_written",
    "threadgroup_memory",
    "barriers",
    "simdgroup_barriers",
    "simd_ops",
    "matrix_loads",
    "matrix_products",
    "multiply_adds",
)


class KernelError(RuntimeError):
    """A launch did what hardware would only sometimes punish. The message says what and where."""


@dataclass(frozen=True)
class Launch:
    """One launch and its counts: bytes, and numbers over all threadgroups.

    output_bytes is the size of the buffers that it fills.
    """

    name: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    counts: dict[str, int]
    output_bytes: int


@dataclass
class _Recorder:
    order: int = 0
    lanes_may_collide: bool = False
    launches: list[Launch] = field(default_factory=list)


_recorder: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def launches(order: int = 0, lanes_may_collide: bool = False):
    """Collects every `Launch` made inside. order: 0 forward, -1 backward, else a random seed.

    lanes_may_collide forgives lanes of one SIMD group that write one address, which hardware does
    in one instruction: sound only where they write the same value, and that is not checked.
    """
    recorder = _Recorder(order, lanes_may_collide)
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def metal_kernel(
    name, input_names, output_names, source, header="", *, wrap=None, launch=None, **_options
):
    """`mx.fast.metal_kernel` on this machine's CPU. Options of the Metal compiler are ignored.

    wrap and launch take the place of `build.wrap` and of what compiles and runs its text (cuda.py).
    """
    wrap, launch = wrap or build.wrap, launch or _launch

    def kernel(
        *, inputs, output_shapes, output_dtypes, grid, threadgroup, template=(), **_call_options
    ):
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        described = [
            (n, _TYPES[x.dtype], x.shape) for n, x in zip(input_names, arrays, strict=True)
        ]
        outputs = list(zip(output_names, output_dtypes, output_shapes, strict=True))
        text = wrap(
            source,
            header,
            described,
            [(n, _TYPES[dtype], shape) for n, dtype, shape in outputs],
            [(n, _template_value(v)) for n, v in template],
        )
        buffers = []
        for (n, _, shape), x in zip(described, arrays, strict=True):
            data = np.ascontiguousarray(_to_numpy(x))
            buffers.append(data)
            if shape and f"{n}_shape" in source:
                buffers.append(np.array(shape, np.int32))
            if shape and f"{n}_strides" in source:
                buffers.append(np.array(data.strides, np.int64) // data.itemsize)
            if shape and f"{n}_ndim" in source:
                buffers.append(np.array(len(shape), np.int32))
        results = [np.empty(shape, _numpy_dtype(dtype)) for _, dtype, shape in outputs]
        launch(text, name, buffers, results, grid, threadgroup)
        return [mx.array(x).view(dtype) for x, (_, dtype, _) in zip(results, outputs, strict=True)]

    return kernel


def _launch(text, name, buffers, results, grid, threadgroup):
    library = build.library(text)
    if np.prod(np.minimum(grid, threadgroup)) > 1024:
        raise KernelError(f"{name}: more than 1024 threads in a threadgroup")
    run = ctypes.CDLL(str(library), mode=os.RTLD_LOCAL | os.RTLD_NOW).harness_launch
    recorder = _recorder.get() or _Recorder()
    everything = [*buffers, *results]
    n = len(everything)
    # runtime.cpp's Kind; arrays of less than 8 elements are in the constant address space
    kinds = [2 * (x.size < 8) for x in buffers] + [1] * len(results)
    counts = (ctypes.c_uint64 * len(_COUNTS))()
    message, place = ctypes.create_string_buffer(1024), ctypes.c_void_p()
    failed = run(
        n,
        (ctypes.c_void_p * n)(*(x.ctypes.data for x in everything)),
        (ctypes.c_uint64 * n)(*(x.nbytes for x in everything)),
        (ctypes.c_uint8 * n)(*kinds),
        (ctypes.c_uint32 * 3)(*grid),
        (ctypes.c_uint32 * 3)(*threadgroup),
        ctypes.c_int(recorder.order),
        ctypes.c_int(recorder.lanes_may_collide),
        counts,
        message,
        ctypes.c_uint64(len(message)),
        ctypes.byref(place),
    )
    if failed:
        where = _line(library, place.value)
        raise KernelError(f"{name}{where}: {message.value.decode()}")
    found = dict(zip(_COUNTS, counts, strict=True))
    filled = sum(x.nbytes for x in results)
    recorder.launches.append(Launch(name, tuple(grid), tuple(threadgroup), found, filled))


def _line(library, place) -> str:
    """ ", line 12 of the kernel" for an offset in the library, where addr2line is installed."""
    if not place or not shutil.which("addr2line"):
        return ""
    done = subprocess.run(
        ["addr2line", "-i", "-e", str(library), hex(place - 1)], capture_output=True, text=True
    )
    for line in done.stdout.splitlines():  # innermost first; skips the harness's own headers
        file, _, number = line.split()[0].rpartition(":")
        if os.path.basename(file) in ("kernel", "header"):
            return f", line {number} of the {os.path.basename(file)}"
    return ""


def _template_value(value) -> str:
    if isinstance(value, mx.Dtype):
        return _TYPES[value]
    return str(value).lower() if isinstance(value, bool) else str(int(value))


def _numpy_dtype(dtype):
    if dtype == mx.bfloat16:
        return np.uint16
    return np.array(mx.zeros((), dtype)).dtype


def _to_numpy(x):
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x)
