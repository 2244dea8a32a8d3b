"""What tests ask of a state."""

from __future__ import annotations

from mlx_sleep.models.base import State


def kv_length(state: State) -> int:
    """Tokens in the KV cache: the largest number of slots in use in any layer."""
    return max((layer.get("length", 0) for layer in state), default=0)
