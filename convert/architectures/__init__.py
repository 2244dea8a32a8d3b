"""The architectures that the converter reads: one module each, found by what it exports.

A module here exports ARCHITECTURE, or ARCHITECTURES for a family that shares its mapping.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import Any

from ...models.compat import has_mlx_lm_model
from ...utils.errors import UserError
from .base import Architecture


@functools.cache
def architectures() -> tuple[Architecture, ...]:
    """All of them, in the order of their modules' names."""
    found: list[Architecture] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        exported = importlib.import_module(f"{__name__}.{module}")
        found += getattr(exported, "ARCHITECTURES", ())
        found += [exported.ARCHITECTURE] if hasattr(exported, "ARCHITECTURE") else []
    return tuple(found)


def for_source(
    model_type: Any, config: dict | None = None, *, or_mlx_lm: bool = False
) -> Architecture:
    """The architecture that reads PyTorch checkpoints of this model_type. UserError for none.

    config     theirs, where several architectures have the same source; without it the first counts
    or_mlx_lm  take what mlx-lm alone knows, too, as mlx-lm reads it
    """
    for architecture in architectures():
        if model_type in architecture.sources and (config is None or architecture.reads(config)):
            return architecture
    if or_mlx_lm and has_mlx_lm_model(model_type):
        from .mlx_lm import as_mlx_lm

        return as_mlx_lm(model_type)
    known = ", ".join(sorted({name for a in architectures() for name in a.sources}))
    raise UserError(f"cannot convert model_type {model_type!r}; mlx-sleep can convert: {known}")


def for_ours(model_type: Any) -> Architecture | None:
    """The architecture of a folder of ours; None when the converter doesn't know it."""
    return next((a for a in architectures() if a.model_type == model_type), None)
