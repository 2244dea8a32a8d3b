"""Cuts a .metal file into its kernels and compiles one when it is first called.

The text before a file's first kernel, with other files in the place of its #include "FILE", is
shared by its kernels. Each of these opens with a line that names its buffers in order:

    // kernel NAME(input, ...) -> (output, ...)

followed by the body of the function; MLX writes the signature. This module knows no op.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

import mlx.core as mx

from ..utils.errors import UserError

PREFIX = "mlx_sleep_"
"""Of the names that Metal sees: mlx-lm has a kernel `gated_delta_step`, too."""

without_metal: Callable | None = None
"""Takes the place of `mx.fast.metal_kernel` where there is no Metal. Tests set it."""

_INCLUDE = re.compile(r'^#include "(\w+\.metal)"\n', re.MULTILINE)
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
    return cut(_text(file))


def _text(file: str) -> str:
    return (resources.files(__package__) / file).read_text()


def cut(text: str, text_of: Callable[[str], str] = _text) -> dict[str, Source]:
    """The kernels of a text, by name; text_of(file) is the text of a file that it includes."""
    header, *parts = _MARK.split(_INCLUDE.sub(lambda found: text_of(found[1]), text))
    kernels = {}
    for name, inputs, outputs, body in zip(*[iter(parts)] * 4, strict=True):
        names = tuple(inputs.split(", ")), tuple(outputs.split(", "))
        kernels[name] = Source(name, *names, header, body)
    return kernels


def runs() -> bool:
    """Whether something here can run a kernel: Metal, or what tests put in its place."""
    return mx.metal.is_available() or without_metal is not None


@functools.cache
def kernel(file: str, name: str):
    """A callable with the arguments of a kernel made by `mx.fast.metal_kernel`."""
    return build(read(file)[name])


def build(source: Source):
    """The callable of a Source. UserError where nothing can run it (`runs`)."""
    make = mx.fast.metal_kernel if mx.metal.is_available() else without_metal
    if make is None:
        raise UserError("the Metal kernels need a Metal GPU, and this machine has none")
    return make(PREFIX + source.name, source.inputs, source.outputs, source.body, source.header)
