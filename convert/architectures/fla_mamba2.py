"""mamba2 of flash-linear-attention, and of transformers, whose tensors have the same names."""

from __future__ import annotations

import math

from ...utils.errors import UserError
from .base import Architecture, Tensor
from .fields import complete
from .fla_gated_deltanet import to_ours, to_theirs

# transformers' fields, which fla's early versions shared.
_RENAMED = {"layer_norm_epsilon": "norm_eps", "time_step_limit": "dt_limit"}


def config(theirs: dict) -> dict:
    if "norm_eps" not in theirs:  # transformers', which has other defaults than fla
        theirs = complete({**theirs, "model_type": "mamba2"})
    ours = {**theirs, "model_type": ARCHITECTURE.model_type}
    for old, new in _RENAMED.items():
        if old in ours:
            ours.setdefault(new, ours.pop(old))
    if (limit := ours.get("dt_limit")) is not None:
        try:
            low, high = (_finite(end) for end in limit)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"dt_limit must be two numbers, not {limit!r}") from error
        ours["dt_limit"] = [low, high]
    return ours


def _finite(end) -> float | None:
    """An end of dt_limit; None for infinity, which transformers writes as an object."""
    if isinstance(end, dict):  # {"__float__": "Infinity"}
        end = end["__float__"]
    return float(end) if math.isfinite(float(end)) else None


def _to_ours(name: str, x) -> Tensor:
    # The original Mamba-2 checkpoints say `embedding`; both libraries accept it.
    return to_ours(name.replace("backbone.embedding.", "backbone.embeddings."), x)


def _reads(theirs: dict) -> bool:
    """fla's, and those of transformers that mlx-lm computes otherwise; mlx-lm has the rest."""
    return "norm_eps" in theirs or theirs.get("layer_norm_epsilon", 1e-5) != 1e-5


ARCHITECTURE = Architecture(
    model_type="fla_mamba2",
    sources=("mamba2",),
    config=config,
    to_ours=_to_ours,
    to_theirs=to_theirs,
    dropped=(r".*rotary\.inv_freq",),
    reads=_reads,
)
