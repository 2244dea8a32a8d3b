"""sleep_hybrid: this project's own. Its PyTorch definition is convert/torch/sleep_hybrid.py."""

from __future__ import annotations

from .base import Architecture

ARCHITECTURE = Architecture(
    model_type="sleep_hybrid",
    sources=("sleep_hybrid",),
    config=dict,
    dropped=(r".*rotary_emb\.inv_freq",),
)
