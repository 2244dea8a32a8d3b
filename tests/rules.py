"""Both fast-weight rules with everything that computes them, for tests that hold for either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from mlx_sleep.kernels import gated_delta as gated_delta_kernels
from mlx_sleep.kernels import ssd as ssd_kernels
from mlx_sleep.ops import gated_delta, ssd


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


def spoil(inputs, mask):
    """[q, k, v, g, beta] with NaN at padding."""
    return [np.where(mask.reshape(*mask.shape, *[1] * (x.ndim - 2)), x, np.nan) for x in inputs[:5]]
