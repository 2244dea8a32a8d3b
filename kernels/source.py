"""Cuts a .metal file into its kernels and compiles one when it is first called.

A file holds one family. What stands before its first kernel is shared by all of them, and each
kernel opens with a line that names its buffers in order:

    // kernel NAME(input, ...) -> (output, ...)

followed by the body of the function; MLX writes the signature. Where there is no Metal the body
runs in the harness, on the CPU, checked and very slowly. This module knows no op.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

import mlx.core as mx

_MARK = re.compile(r"^// kernel (\w+)\(([\w, ]*)\) -> \(([\w, ]*)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """One kernel's text, as `mx.fast.metal_kernel` takes it."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    header: str
    body: str


def read(file: str) -> dict[str, Source]:
    """The kernels of a file in this package, by name."""
    return cut((resources.files(__package__) / file).read_text())


def cut(text: str) -> dict[str, Source]:
    """The kernels of a file's text, by name."""
    header, *parts = _MARK.split(text)
    kernels = {}
    for name, inputs, outputs, body in zip(*[iter(parts)] * 4, strict=True):
        names = (tuple(x.split(", ")) for x in (inputs, outputs))
        kernels[name] = Source(name, *names, header, body)
    return kernels


@functools.cache
def kernel(file: str, name: str):
    """A callable with the arguments of a kernel made by `mx.fast.metal_kernel`."""
    return build(read(file)[name])


def build(source: Source):
    """The callable of a Source: Metal's where there is Metal, otherwise the harness's."""
    if mx.metal.is_available():
        make = mx.fast.metal_kernel
    else:
        from .harness import metal_kernel as make
    return make(source.name, source.inputs, source.outputs, source.body, source.header)
