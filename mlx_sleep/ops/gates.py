"""The decay of Mamba-2, which Gated DeltaNet and the Jet layer have too."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn


def decay_gates(x, A_log, dt_bias, limits=(0.0, math.inf)):
    """(g, step), both [B, T, H] float32: the log of the decay a_t, and the time step.

    step = clip(softplus(x + dt_bias)) and g = -exp(A_log) step, with x [B, T, H] as a projection
    gives it, A_log and dt_bias [H], limits the least and the largest step (arXiv 2405.21060).
    Mamba-2 writes with b_t = step; the gated delta rule has a gate of its own for that.
    Differentiable, with no gradient through a step that a limit holds.
    """
    step = nn.softplus(x.astype(mx.float32) + dt_bias.astype(mx.float32))
    if tuple(limits) != (0.0, math.inf):
        step = mx.clip(step, *limits)
    return -mx.exp(A_log.astype(mx.float32)) * step, step
