"""Which implementation an op runs on: decided here and nowhere else.

    metal      this package's own Metal kernels (kernels/)
    mlx.fast   MLX's Metal kernels
    chunk      matrix products on arrays, on any backend
    step       one token on arrays

This package's kernels are right in the tests' harness, which runs them on a CPU, but no Apple GPU
has run them yet. Until one has, they run only where MLX_SLEEP_KERNELS=metal asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

from ..kernels import source
from ..kernels.checks import supported
from ..utils.errors import UserError

Heads = tuple[int, int, int, int]
"""Hk, Hv, Dk, Dv: how many heads q and k have, how many v has, and their sizes."""

VARIABLE = "MLX_SLEEP_KERNELS"
"""Environment variable: `metal` forces this package's Metal kernels, `array` the paths on arrays;
unset, the machine decides."""

MLX_HEADS: set[Heads] = {
    (16, 16, 128, 128),
    (16, 32, 128, 128),
    (16, 48, 128, 128),
    (16, 64, 128, 128),
    (24, 24, 128, 128),
    (32, 32, 128, 128),
}
"""Heads that `mx.fast.gated_delta_update` has Metal kernels for, in mlx 0.32.4. For others, and
where it is given a mask, it is a graph of several ops for each token."""


def path(op: str, tokens: int, heads: Heads) -> str:
    """The path of the op "gated_delta" or "ssd" for so many tokens with these heads.

    UserError where the variable has another value, or asks for Metal where there is none.
    """
    wish = _wish()
    if wish == "metal" and supported(*heads[2:]):
        return "metal"
    if op == "gated_delta" and wish != "array" and _on_metal() and heads in MLX_HEADS:
        return "mlx.fast"
    return "step" if tokens == 1 else "chunk"


def fused(op: str, tokens: int, heads: Heads, taps: int, mask) -> bool:
    """Whether a mixer's whole step is one launch (`step` in kernels/).

    For one token without padding, where the op itself would run on this package's kernels.
    """
    one = tokens == 1 and mask is None and taps > 1
    return one and path(op, tokens, heads) == "metal"


def conv_path() -> str:
    """ "metal" or "array", for any shape."""
    return "metal" if _wish() == "metal" else "array"


def _wish() -> str:
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "metal", "array"):
        raise UserError(f"{VARIABLE} must be metal or array, or unset; it is {wish!r}")
    if wish == "metal" and not source.runs():
        raise UserError(f"{VARIABLE}=metal needs a Metal GPU, and this machine has none; unset it")
    return wish


def _on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def differentiable(forward: Callable, backward: Callable, inputs: tuple, mask):
    """forward(*inputs, mask), with backward(*inputs, *cotangents, mask) as its gradient."""

    @mx.custom_function
    def op(*inputs):
        return forward(*inputs, mask)

    @op.vjp
    def op_vjp(inputs, cotangents, _outputs):
        return tuple(backward(*inputs, *cotangents, mask))

    return op(*inputs)
