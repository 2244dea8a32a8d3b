"""Judging the implementations of the ops for the shapes that a model uses."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..ops import calibration
from ..ops.paths import by_verdict, recording, unjudged
from ..ops.verdicts import Shape
from .base import SleepModel


def calibrate(
    model: SleepModel,
    should_stop: Callable[[], bool] | None = None,
    *,
    gradients: bool = False,
    again: bool = False,
) -> None:
    """Judges what this model uses and what has been met unjudged; with gradients for training.

    Nothing happens where all of it has a verdict, or no verdict decides (see `ops.paths`).
    should_stop() is asked before each shape; `again` measures what has a verdict, too.
    """
    if by_verdict():
        shapes = shapes_of(model, gradients=gradients) | unjudged()
        calibration.calibrate(shapes, should_stop or (lambda: False), again)


def shapes_of(model: SleepModel, *, gradients: bool = False) -> set[Shape]:
    """What a prompt and a single token ask of the ops. Nothing is computed."""
    with recording() as shapes:
        for tokens in (1, 2):
            model.hidden(mx.zeros((1, tokens), mx.int32))  # lazy
    if gradients:
        shapes |= {s._replace(use="gradient") for s in shapes if s.use == "prompt"}
    return shapes
