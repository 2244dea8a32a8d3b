"""Fields of a config.json of transformers, brought to what mlx-lm reads.

Fields left out take the maker's defaults, which are those of transformers' config classes and not
always mlx-lm's: defaults.json has them, and a test holds it to transformers. A value that mlx-lm
would ignore is refused, since its model would compute something else than PyTorch's.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models import mlx_lm_model
from ...utils.errors import UserError

NO_LIMIT = (0.0, math.inf)


@functools.cache
def _defaults() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "defaults.json").read_text())


def complete(config: dict) -> dict:
    """A copy with the maker's defaults for fields left out. model_type is ours by now."""
    return {**_defaults()[config["model_type"]], **config}


def only(config: dict, **known: Any) -> dict:
    """A copy. UserError where a field that mlx-lm ignores has another value than the known one.

    null says nothing.
    """
    for name, value in known.items():
        if config.get(name) is not None and config[name] != value:
            raise UserError(
                f"{config.get('model_type')} with {name} {config[name]!r} is not known to mlx-lm, "
                f"only {value!r}"
            )
    return dict(config)


def every(config: dict) -> dict:
    """UserError unless each n-th layer attends, which is all that mlx-lm can express."""
    kinds = config.get("layer_types")
    if not kinds:
        return config
    n = config.get("full_attention_interval") or kinds.index("full_attention") + 1
    if [kind == "full_attention" for kind in kinds] != [
        not i % n for i in range(1, len(kinds) + 1)
    ]:
        raise UserError(f"{config['model_type']}: mlx-lm wants attention in every n-th layer")
    return {**config, "full_attention_interval": n}


def text_model(config: dict, model_type: str) -> dict:
    """The text model's config, of one with or without a vision tower.

    Token ids and tied embeddings may stand in either part. What is exported again is the text
    model alone.
    """
    text = config.get("text_config")
    if not isinstance(text, dict):
        return {**config, "model_type": model_type}
    shared = ("eos_token_id", "bos_token_id", "pad_token_id", "tie_word_embeddings", "dtype")
    outer = {n: config[n] for n in shared if n in config}
    text = {**outer, **text, "model_type": model_type}
    return {**text, "source_config": dict(text)}


def flat_rope(config: dict, *, short_factors: bool = False) -> dict:
    """rope_parameters, as transformers 5 writes them, in the fields that mlx-lm reads."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        check_scaling(config.get("rope_scaling") or {}, short_factors=short_factors)
        return config
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("RoPE that differs from layer to layer is not known to mlx-lm")
    names = ("rope_theta", "partial_rotary_factor")
    flat = {n: rope[n] for n in names if rope.get(n) is not None}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    check_scaling(rope, short_factors=short_factors)
    return {**config, **flat, "rope_scaling": dict(rope) if scaled else None}


def check_scaling(rope: dict, *, short_factors: bool = False) -> None:
    """UserError for scaled RoPE that mlx-lm computes otherwise than transformers.

    short_factors  of longrope: they are honoured (see models/mlx_lm_rope.py)
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    wrong = None
    if kind == "yarn":
        factor, attention = rope.get("factor") or 1.0, rope.get("attention_factor")
        scales = [bool(rope.get(name)) for name in ("mscale", "mscale_all_dim")]
        usual = 0.1 * math.log(max(factor, 1.0)) + 1.0
        if not rope.get("original_max_position_embeddings"):
            wrong = "without original_max_position_embeddings"
        elif rope.get("truncate") is False:
            wrong = "with truncate false"
        elif scales[0] != scales[1]:
            wrong = "with one of mscale and mscale_all_dim"
        elif attention is not None and (all(scales) or not math.isclose(attention, usual)):
            wrong = f"with attention_factor {attention}"
    elif kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
        if not short_factors:  # mlx-lm takes long_factor in a short text too
            wrong = "with a short_factor of its own"
    if wrong:
        raise UserError(f"RoPE of type {kind} {wrong} is not known to mlx-lm")


def finite(limit: Iterable) -> list[float]:
    """A time_step_limit for a JSON file, which has no infinity: no step reaches 1e30."""
    return [min(float(x), 1e30) for x in mlx_lm_model.untagged(limit)]
