"""What the converter knows about one architecture: from PyTorch checkpoints to ours, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

Tensor = tuple[str, mx.array]
Weights = dict[str, mx.array]


def unchanged(name: str, x: mx.array) -> Tensor:
    """The mapping of an architecture whose tensors have the same names and shapes on both sides."""
    return name, x


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints. Arrays are lazy: a mapping may reshape them, not read them.

    model_type  ours: a module of mlx_sleep.models, or the model_type of mlx-lm
    sources     values of model_type in a PyTorch config.json that this reads
    config      their config.json -> ours, without the field `sleep`
    to_ours     one tensor; a name that it doesn't know passes through
    to_theirs   the inverse of to_ours, to the bit. None where no exact inverse is known: such a
                folder cannot be exported
    loop_range  of our config: the blocks that the paper loops over; None is all
    dropped     regular expressions (matched in full) of source tensors that hold no weights of
                the decoder: rotary inv_freq, heads for training, ...
    dropped_for more of them, of our config
    reads       (their config) -> whether this reads it, where several have the same source
    sanitize    (our config, all tensors) -> all tensors, where a target is made of several
                sources, as in mlx-lm. It runs in place of to_ours
    unsanitize  its inverse, to the bit but for what `sanitize` rounded, in place of to_theirs
    """

    model_type: str
    sources: tuple[str, ...]
    config: Callable[[dict], dict]
    to_ours: Callable[[str, mx.array], Tensor] = unchanged
    to_theirs: Callable[[str, mx.array], Tensor] | None = unchanged
    loop_range: Callable[[dict], tuple[int, int] | None] = lambda config: None
    dropped: tuple[str, ...] = ()
    dropped_for: Callable[[dict], tuple[str, ...]] = lambda config: ()
    reads: Callable[[dict], bool] = lambda config: True
    sanitize: Callable[[dict, Weights], Weights] | None = None
    unsanitize: Callable[[dict, Weights], Weights] | None = None

    @property
    def can_export(self) -> bool:
        """Whether an exact way back to PyTorch's names is known."""
        if self.sanitize is not None:
            return self.unsanitize is not None
        return self.to_theirs is not None
