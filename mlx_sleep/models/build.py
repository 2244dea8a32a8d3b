"""A model of what its config describes, without its weights.

This module knows the names of architectures and no more of them; a foreign config is the business
of `convert`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import one_line
from .base import SleepModel
from .compat import has_mlx_lm_model
from .config import check_quantization

MODEL_TYPES = ("sleep_hybrid", "fla_gated_deltanet", "fla_mamba2", "jet_nemotron", "ouro")
"""Our own architectures: `model_type` is the name of a module beside this one."""


def get_model_classes(model_type: Any) -> tuple[Callable[[Any], SleepModel], Any]:
    """The (Model, ModelArgs) of an architecture: ours, or mlx-lm's wrapped. UserError for none."""
    if model_type in MODEL_TYPES:
        module = importlib.import_module(f"{__package__}.{model_type}")
        return module.Model, module.ModelArgs
    if has_mlx_lm_model(model_type):
        from . import mlx_lm_model

        return mlx_lm_model.Model, mlx_lm_model.ModelArgs
    shown, known = schema.shown(model_type), ", ".join(MODEL_TYPES)
    raise UserError(
        f"unknown model_type {shown}; mlx-sleep can load {known}, and what mlx-lm can load"
    )


def build(
    config: dict, tensors: Collection[str] = (), *, where: str | Path = "config.json"
) -> SleepModel:
    """The model that the config describes; its arrays are not evaluated.

    tensors  the names of the weights: a layer is quantized where they have its scales
    where    the file that an error is about
    """
    if "model_file" in config:
        name = schema.shown(config["model_file"])
        raise UserError(f"{where} asks to run {name}: mlx-sleep runs no such code")
    try:
        model_class, args_class = get_model_classes(config.get("model_type"))
        model = model_class(args_class.from_dict(config))
        if config.get("sleep_layers"):
            from . import inserted

            model = inserted.Inserted(model, config["sleep_layers"])
        if model.sleep.fold == "user" and not model.can_fold_user:
            raise UserError('fold "user" needs sleep layers, all of kind delta_attention')
        if (quantization := config.get("quantization")) is not None:
            common = check_quantization(quantization)
            nn.quantize(
                model,
                group_size=common.group_size,
                bits=common.bits,
                mode=common.mode,
                class_predicate=lambda name, module: (
                    hasattr(module, "to_quantized")
                    and f"{name}.scales" in tensors
                    and quantization.get(name, True)
                ),
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever a wrong type or size sets off
        raise UserError(f"{where} has a value that does not fit: {one_line(error)}") from error
    return model
