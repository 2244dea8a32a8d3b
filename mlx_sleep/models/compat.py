"""What mlx-sleep uses of other packages beyond their documented interfaces, in one place.

pyproject.toml bounds the versions; tests/test_compat.py names those that were tried.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlx.nn as nn


def before_0_32() -> bool:
    """Whether this is an mlx-lm before 0.32, the last that runs on Python 3.10."""
    major, minor = version("mlx-lm").split(".")[:2]
    return (int(major), int(minor)) < (0, 32)


def has_mlx_lm_model(model_type: Any) -> bool:
    """Whether mlx-lm has an architecture of this name. Imports mlx-lm, and its module if any."""
    if not isinstance(model_type, str) or not model_type.isidentifier():
        return False  # a dot would import something else
    from mlx_lm.utils import MODEL_REMAPPING

    name = f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}"
    try:
        return find_spec(name) is not None and hasattr(importlib.import_module(name), "ModelArgs")
    except (ImportError, SystemExit):  # one of them exits where a package is missing
        return False


def mlx_lm_classes(config: dict) -> tuple[type[nn.Module], Any]:
    """mlx-lm's (Model, ModelArgs) for the contents of a config.json.

    ValueError or AttributeError when it has no such architecture.
    """
    from mlx_lm.utils import _get_classes

    return _get_classes(config)


def causal_lm_class(config: Any) -> Any:
    """transformers' class for causal language modeling of a config of its own; KeyError for none.

    Needs torch. The mapping is public by its name, but not documented.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
