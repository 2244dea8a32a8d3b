"""Both fast-weight rules with everything that computes them, for tests that hold for either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import mlx.core as mx
import numpy as np

from mlx_sleep.kernels import gated_delta as gated_delta_kernels
from mlx_sleep.kernels import ssd as ssd_kernels
from mlx_sleep.ops import gated_delta, ssd
from tests.ops_reference import assert_close, draw, reference


@dataclass(frozen=True)
class Rule:
    """name is that of `ops_reference.reference`; forms are all that computes it on arrays."""

    name: str
    op: Callable
    naive: Callable
    step: Callable
    chunk: Callable
    CHUNK: int
    kernels: ModuleType
    forms: dict[str, Callable]

    def __str__(self):
        return self.name


GATED_DELTA = Rule(
    "gated_delta",
    gated_delta.gated_delta,
    gated_delta.gated_delta_naive,
    gated_delta.gated_delta_step,
    gated_delta.gated_delta_chunk,
    gated_delta.CHUNK,
    gated_delta_kernels,
    {
        "naive": gated_delta.gated_delta_naive,
        "chunk": gated_delta.gated_delta_chunk,
        "mlx.fast": gated_delta.gated_delta_mlx,
        "fastest": gated_delta.gated_delta,
    },
)
SSD = Rule(
    "ssd",
    ssd.ssd,
    ssd.ssd_naive,
    ssd.ssd_step,
    ssd.ssd_chunk,
    ssd.CHUNK,
    ssd_kernels,
    {"naive": ssd.ssd_naive, "chunk": ssd.ssd_chunk, "fastest": ssd.ssd},
)
RULES = {rule.name: rule for rule in (GATED_DELTA, SSD)}


GATES = {"none": 0.0, "almost none": -1e-6, "full": -100.0, "mixed": None}
"""Log decays at which exponentials are at their worst."""


def draw_gates(rng, name: str, T: int):
    """g of two rows and four heads: a number, or [2, T, 4] where a few tokens forget everything and
    the others little."""
    if GATES[name] is not None:
        return GATES[name]
    return np.where(rng.random((2, T, 4)) < 0.2, -100.0, -rng.exponential(0.05, (2, T, 4)))


def nan_in_the_middle_row(rng, T: int, **shape):
    """Inputs of three rows, once with a NaN in each of the six arrays, in the second row."""
    for i in range(6):
        inputs = draw(rng, B=3, T=T, **shape)
        inputs[i] = np.array(inputs[i])
        inputs[i][1].flat[0] = np.nan
        yield inputs


def assert_nan_stays_in_its_row(rule: Rule, inputs, o, state, tolerance: float) -> None:
    """Of `nan_in_the_middle_row`: the other rows are what they are alone."""
    expected = reference(rule.name, *(x[[0, 2]] for x in inputs))
    keep = mx.array([0, 2])
    assert_close((o[keep], state[keep]), expected, tolerance)
    assert not np.isfinite(np.array(o[1])).all()


def spoil(inputs, mask):
    """[q, k, v, g, beta] with NaN at padding."""
    return [np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan) for x in inputs[:5]]
