"""On which implementation an op runs: decided here and nowhere else.

    metal      this package's own Metal kernels (kernels/)
    mlx.fast   MLX's Metal kernels
    chunk      matrix products on arrays, on any backend
    step       one token on arrays

The kernels of this package are right in the tests' harness, which runs them on a CPU, but no Apple
GPU has run them yet. Until one has, they are taken only where MLX_SLEEP_KERNELS=metal asks for
them.
"""

from __future__ import annotations

import os

import mlx.core as mx

from ..kernels import source
from ..kernels.chunks import supported
from ..utils.errors import UserError

VARIABLE = "MLX_SLEEP_KERNELS"
"""Environment variable: `metal` forces the Metal kernels of this package, `array` the paths on
arrays; unset, the machine decides."""


def path(op: str, tokens: int, Dk: int, Dv: int) -> str:
    """The path of op "gated_delta" or "ssd" for a call of so many tokens with heads Dk, Dv.

    Heads that the kernels do not support go the way they would go without the variable.
    UserError where the variable has another value, or asks for Metal where there is none.
    """
    wish = _wish()
    if wish == "metal" and supported(Dk, Dv):
        return "metal"
    metal = mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)
    if op == "gated_delta" and metal and wish != "array":
        return "mlx.fast"
    return "step" if tokens == 1 else "chunk"


def fused(op: str, tokens: int, Dk: int, Dv: int, taps: int, mask) -> bool:
    """Whether a mixer takes the one launch that is its whole step (`step` in kernels/).

    For one token without padding, where the op itself would take its Metal kernels.
    """
    one = tokens == 1 and mask is None and taps > 1
    return one and path(op, tokens, Dk, Dv) == "metal"


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


def differentiable(forward, backward, inputs, mask):
    """forward(*inputs, mask), with backward(*inputs, *cotangents, mask) as its gradient."""

    @mx.custom_function
    def op(*inputs):
        return forward(*inputs, mask)

    @op.vjp
    def op_vjp(inputs, cotangents, _outputs):
        return tuple(backward(*inputs, *cotangents, mask))

    return op(*inputs)
