"""Fields of a config.json of transformers, brought to what mlx-lm reads.

Fields left out take the maker's defaults, which are those of transformers' config classes and not
always mlx-lm's: defaults.json has them, and a test holds it to transformers. A value that mlx-lm
would ignore is refused, since its model would compute something else than PyTorch's.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...models import mlx_lm_model
from ...utils import schema
from ...utils.errors import UserError

NO_LIMIT = (0.0, math.inf)


@functools.cache
def _defaults() -> dict[str, dict]:
    return json.loads((Path(__file__).parent / "defaults.json").read_text())


def complete(config: dict) -> dict:
    """A copy with the maker's defaults for fields left out. model_type is ours by now.

    null is taken for left out, but not where it can be meant: no window, no capping of logits.
    """
    defaults = _defaults()[config["model_type"]]
    means = re.compile(r"sliding_window|.*_softcapping|head_dim")
    given = {n: x for n, x in config.items() if x is not None or means.fullmatch(n)}
    return {**defaults, **{n: x for n, x in config.items() if n not in defaults}, **given}


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
    """RoPE's fields, as transformers 4 or 5 writes them, in those that mlx-lm reads.

    As in transformers, rope_scaling comes before rope_parameters, and what stands in either
    comes before the same field outside; rope_type comes before type.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("RoPE that differs from layer to layer is not known to mlx-lm")
    names = ("rope_theta", "partial_rotary_factor")
    flat = {n: rope[n] for n in names if rope.get(n) is not None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    check_scaling(rope, config.get("max_position_embeddings"), short_factors=short_factors)
    rope = {**{n: x for n, x in rope.items() if n != "type"}, "rope_type": kind}
    return {**config, **flat, "rope_scaling": rope if kind != "default" else None}


def check_scaling(rope: dict, longest: int | None = None, *, short_factors: bool = False) -> None:
    """UserError for scaled RoPE that mlx-lm computes otherwise than transformers.

    longest        max_position_embeddings, where it is known
    short_factors  of longrope: they are honoured (see models/mlx_lm_details.py)
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return
    if not isinstance(kind, str) or kind not in _SCALINGS:
        known = ", ".join(_SCALINGS)
        raise UserError(f"RoPE of type {schema.shown(kind)} is not known; known are {known}")
    wrong = _missing(kind, rope)
    factor, original = rope.get("factor"), rope.get("original_max_position_embeddings")
    attention = rope.get("attention_factor")
    if wrong is None and kind == "yarn":
        scales = [bool(rope.get(name)) for name in ("mscale", "mscale_all_dim")]
        usual = 0.1 * math.log(max(factor or 1.0, 1.0)) + 1.0
        if rope.get("truncate") is False:
            wrong = "with truncate false"
        elif scales[0] != scales[1]:
            wrong = "with one of mscale and mscale_all_dim"
        elif attention is not None and (all(scales) or not math.isclose(attention, usual)):
            wrong = f"with attention_factor {attention}"
    elif wrong is None and kind in ("longrope", "su"):
        if attention is not None:
            wrong = f"with attention_factor {attention}"
        elif factor is not None and longest and not math.isclose(factor * original, longest):
            wrong = f"with a factor, {factor}, that is not how much longer texts may be"
        elif not short_factors and rope.get("short_factor") != rope.get("long_factor"):
            wrong = "with a short_factor of its own"  # mlx-lm takes long_factor in a short text too
    if wrong:
        raise UserError(f"RoPE of type {kind} {wrong} is not known to mlx-lm")


# Kinds of scaled RoPE -> fields that they need, and that mlx-lm would give defaults of its own.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("original_max_position_embeddings",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
    "su": ("short_factor", "long_factor"),
}


def _missing(kind: str, rope: dict) -> str | None:
    """What a scaling lacks, or has of a wrong type."""
    for name in _SCALINGS[kind]:
        if rope.get(name) is None:
            return f"without {name}"
    for name, value in rope.items():
        if name.endswith(("factor", "_embeddings")) and name not in ("short_factor", "long_factor"):
            number = type(value) in (int, float) and math.isfinite(value) and value > 0
            if value is not None and not number:
                return f"with {name} {schema.shown(value)}"
    return None


def finite(limit: Iterable) -> list[float]:
    """A time_step_limit for a JSON file, which has no infinity: no step reaches 1e30."""
    return [min(float(x), 1e30) for x in mlx_lm_model.untagged(limit)]
