"""The arguments of mlx-lm's models: a config.json as mlx-lm reads it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import MISSING, dataclass, field
from typing import Any

from ..utils.errors import UserError
from .compat import before_0_32, mlx_lm_classes

OLD = before_0_32()
"""Whether this is an mlx-lm before 0.32, as Python 3.10 has it."""
NOT_IN_OLD = ("bailing_hybrid", "falcon_h1", "olmo_hybrid")
"""What such an mlx-lm lacks, or reads otherwise."""


@dataclass
class ModelArgs:
    """config: the contents of config.json, as mlx-lm reads it; sleep: the fields of SleepConfig."""

    config: dict
    sleep: dict = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: dict) -> ModelArgs:
        """From the contents of config.json. UserError when mlx-lm has no such architecture."""
        return cls(config=untagged(config), sleep=config.get("sleep") or {})

    @property
    def vocab_size(self) -> int | None:
        """Rows of the head, where the config says it in one of the usual places."""
        text = self.config.get("text_config") or {}
        return self.config.get("vocab_size", text.get("vocab_size"))

    @staticmethod
    def fields(config: dict) -> set[str]:
        """The fields of config.json that describe the architecture."""
        return {*inspect.signature(classes(config)[1]).parameters, "sleep"}


def untagged(value):
    """Of a config: {"__float__": "Infinity"}, as transformers writes it, read as a float."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {name: untagged(x) for name, x in value.items()}
    return [untagged(x) for x in value] if isinstance(value, list | tuple) else value


def without_nulls(args_class: Any, config: dict) -> dict:
    """Without fields that are null where mlx-lm has a default: libraries write null for unset."""
    own = {
        f.name
        for f in dataclasses.fields(args_class)
        if f.default not in (None, MISSING) and not re.search("None|Optional", str(f.type))
    }
    return {name: x for name, x in config.items() if x is not None or name not in own}


def classes(config: dict) -> tuple[Any, Any]:
    """mlx-lm's (Model, ModelArgs) for a config. No code of a model folder is ever run."""
    model_type = config.get("model_type")
    if config.get("model_file") is not None:
        raise UserError("the model brings its own code (model_file), which mlx-sleep never runs")
    if not isinstance(model_type, str) or not re.fullmatch(r"[\w-]+", model_type):
        raise UserError(f"model_type must be a name, not {model_type!r}")
    if OLD and model_type in NOT_IN_OLD:
        raise UserError(f"{model_type} needs mlx-lm 0.32 or newer, and that Python 3.11")
    try:
        return mlx_lm_classes(config)
    except (AttributeError, ValueError) as error:
        raise UserError(f"mlx-lm has no architecture {model_type!r}; update mlx-lm?") from error
