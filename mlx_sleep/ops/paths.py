"""Which implementation an op runs on: decided here and nowhere else.

    metal      this package's own Metal kernels (kernels/)
    mlx.fast   MLX's Metal kernels
    chunk      matrix products on arrays, on any backend
    step       one token on arrays
    array      a convolution on arrays; a mixer made of ops

On a Metal GPU a verdict decides (`verdicts`): the fastest of those that were right there. A shape
that has none yet takes MLX's kernels or arrays, and is remembered for `calibration`. Elsewhere it
is arrays.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import mlx.core as mx

from ..kernels import source
from ..kernels.checks import supported
from ..utils.errors import UserError
from .verdicts import Shape, verdicts

VARIABLE = "MLX_SLEEP_KERNELS"
"""Environment variable: `metal` forces this package's Metal kernels, `array` the paths on arrays;
unset, verdicts decide."""

MIXERS = ("gated_delta_net", "mamba2", "delta_attention")

MLX_HEADS: set[tuple[int, ...]] = {
    (16, 16, 128, 128),
    (16, 32, 128, 128),
    (16, 48, 128, 128),
    (16, 64, 128, 128),
    (24, 24, 128, 128),
    (32, 32, 128, 128),
}
"""Heads that `mx.fast.gated_delta_update` has Metal kernels for, in mlx 0.32.4. For others, and
where it is given a mask, it is a graph of several ops for each token."""


def shape_of(op: str, tokens: int, sizes: tuple[int, ...], arrays) -> Shape:
    """The Shape of a call of an op with these arrays."""
    use = "token" if tokens == 1 else "prompt"
    return Shape(op, use, sizes, tuple(x.dtype for x in arrays))


def candidates(shape: Shape) -> tuple[str, ...]:
    """The paths that there are, the one on arrays last."""
    op, use, sizes, _ = shape
    if op in ("short_conv", "dynamic_conv"):
        return ("metal", "array") if sizes[-1] > 1 else ("array",)
    metal = ("metal",) if supported(*sizes[2:4]) else ()
    if op in MIXERS:
        return (*metal, "array") if use == "token" and sizes[-1] > 1 else ("array",)
    mlx = ("mlx.fast",) if op == "gated_delta" and sizes in MLX_HEADS else ()
    return (*metal, *mlx, "step" if use == "token" else "chunk")


def path(shape: Shape) -> str:
    """The path that a call takes.

    UserError where the variable has another value, or asks for Metal where there is none.
    """
    if _forced and (name := _forced(shape)):
        return name
    possible = candidates(shape)
    wish = _wish()
    if wish == "metal" and "metal" in possible:
        return "metal"
    if wish or not _on_metal():
        return possible[-1]
    _asked.add(shape)
    return _judged(shape) or ("mlx.fast" if "mlx.fast" in possible else possible[-1])


def gradient_path(shape: Shape, forward: str) -> str:
    """The path of the gradient where the call itself takes `forward`.

    Our kernels' gradient is taken only with a verdict of its own: training asks for one.
    """
    gradient = shape._replace(use="gradient")
    if _forced and (name := _forced(gradient)):
        return name
    if not by_verdict():
        return forward
    return _judged(gradient) or (candidates(gradient)[-1] if forward == "metal" else forward)


def by_verdict() -> bool:
    """Whether verdicts decide: there is a Metal GPU, and the variable is unset."""
    return _on_metal() and not _wish()


def run(shape: Shape, forms: dict[str, Callable], inputs: tuple, mask):
    """forms[path](*inputs, mask) for the call's path, with the gradient of another's."""
    forward = path(shape)
    backward = gradient_path(shape, forward)
    if forward == backward:
        return forms[forward](*inputs, mask)

    def gradient(*args):
        inputs, cotangents, mask = args[:-3], args[-3:-1], args[-1]
        return mx.vjp(lambda *x: forms[backward](*x, mask), inputs, cotangents)[1]

    return differentiable(forms[forward], gradient, inputs, mask)


def differentiable(forward: Callable, backward: Callable, inputs: tuple, mask):
    """forward(*inputs, mask), with backward(*inputs, *cotangents, mask) as its gradient."""

    @mx.custom_function
    def op(*inputs):
        return forward(*inputs, mask)

    @op.vjp
    def op_vjp(inputs, cotangents, _outputs):
        return tuple(backward(*inputs, *cotangents, mask))

    return op(*inputs)


# --- for calibration -----------------------------------------------------------------------

_asked: set[Shape] = set()
_forced: Callable[[Shape], str | None] | None = None


def unjudged() -> set[Shape]:
    """Shapes that were asked for and have no verdict."""
    return {shape for shape in _asked if _judged(shape) is None}


@contextlib.contextmanager
def recording() -> Iterator[set[Shape]]:
    """A set that gets the shapes asked for within the block."""
    global _asked
    before, _asked = _asked, set()
    try:
        yield _asked
    finally:
        _asked = before


@contextlib.contextmanager
def forcing(choose: Callable[[Shape], str | None]) -> Iterator[None]:
    """Within the block a shape takes the path that choose gives; None leaves it as it is."""
    global _forced
    before, _forced = _forced, choose
    try:
        yield
    finally:
        _forced = before


def _judged(shape: Shape) -> str | None:
    verdict = verdicts().get(shape)
    return verdict.taken if verdict and verdict.taken in candidates(shape) else None


def _wish() -> str:
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "metal", "array"):
        raise UserError(f"{VARIABLE} must be metal or array, or unset; it is {wish!r}")
    if wish == "metal" and not source.runs():
        raise UserError(f"{VARIABLE}=metal needs a Metal GPU, and this machine has none; unset it")
    return wish


def _on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
