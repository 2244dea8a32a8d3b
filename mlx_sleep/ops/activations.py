"""silu, three times faster on MLX's CPU backend, and a gate in one kernel on a GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def silu(x):
    """x sigmoid(x), of any shape. Differentiable."""
    if mx.default_device() == mx.Device(mx.cpu) and x.dtype == mx.float32:
        return _silu_power(x)[0]
    return nn.silu(x)


def gated(act: Callable, gate, up):
    """act(gate) * up, of one shape. Differentiable where act is."""
    if mx.default_device() == mx.Device(mx.cpu):
        return act(gate) * up
    return _compiled(act)(gate, up)


@functools.cache
def _compiled(act: Callable) -> Callable:
    return mx.compile(lambda gate, up: act(gate) * up, shapeless=True)


@mx.custom_function
def _silu_power(x):
    # On the CPU backend mx.exp and mx.sigmoid cost 14 and 19 ns an element, mx.power 6.
    gate = 1 / (1 + mx.power(2.718281828459045, -x))
    return x * gate, gate


@_silu_power.vjp
def _silu_power_vjp(x, cotangents, outputs):
    y, gate = outputs
    return cotangents[0] * (gate + y * (1 - gate))  # the gate's own cotangent is never used
