"""mlx-sleep: hybrid language models in MLX that sleep.

    from mlx_sleep import Session, consolidate, load, open_model

Importing the package loads a BLAS on Linux (utils/blas.py), which must come before MLX, and
nothing else: these names import MLX when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .utils.blas import load_blas

if TYPE_CHECKING:
    from .convert.opening import open_model
    from .models.load import load
    from .session import Session
    from .sleep import consolidate

__all__ = ["Session", "__version__", "consolidate", "load", "open_model"]

__version__ = "0.1.0"

BLAS = load_blas()
"""What `load_blas` found when this process first imported the package."""

_MODULES = {
    "Session": "session",
    "consolidate": "sleep",
    "load": "models.load",
    "open_model": "convert.opening",
}


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_MODULES})
