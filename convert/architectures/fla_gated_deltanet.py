"""gated_deltanet of flash-linear-attention: the same names; convolutions lose an axis."""

from __future__ import annotations

from .base import Architecture, Tensor


def config(theirs: dict) -> dict:
    return {**theirs, "model_type": ARCHITECTURE.model_type}


def to_ours(name: str, x) -> Tensor:
    """Taps of a convolution: PyTorch's [C, 1, K] -> [C, K]."""
    fits = _taps(name) and x.ndim == 3 and x.shape[1] == 1
    return (name, x.squeeze(1)) if fits else (name, x)


def to_theirs(name: str, x) -> Tensor:
    return (name, x[:, None]) if _taps(name) else (name, x)


def _taps(name: str) -> bool:
    return name.endswith("conv1d.weight")


ARCHITECTURE = Architecture(
    model_type="fla_gated_deltanet",
    sources=("gated_deltanet",),
    config=config,
    to_ours=to_ours,
    to_theirs=to_theirs,
    dropped=(r".*rotary\.inv_freq",),
)
