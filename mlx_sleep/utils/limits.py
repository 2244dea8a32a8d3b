"""How large a thing from a file may be, unless `--no-limits` (or MLX_SLEEP_NO_LIMITS) lifts it.

A config of a few bytes can ask for a model that no machine builds in a day. The limits are far
above all published models, and not about memory: weights must have the sizes that a config says.
"""

from __future__ import annotations

import os

from .errors import UserError

VARIABLE = "MLX_SLEEP_NO_LIMITS"

LAYERS = 1024
"""Blocks of a model, experts of a layer's list, loops of a wake pass."""
WIDTH = 2**20
"""A model's width, that of its MLP, heads and their sizes."""
VOCABULARY = 2**22
"""Ids of a tokenizer, rows of an embedding."""
PASSES = 1024
"""Passes of a sleep."""
WINDOW = 2**24
"""Tokens of a window."""
TENSORS = 2**18
"""Tensors of a weights file."""
NAME_CHARACTERS = 500
"""The name of a tensor."""
HEADER_BYTES = 100_000_000
"""The header of a safetensors file; the limit of the safetensors library."""
JSON_BYTES = 2**24
"""A config, a recipe, an index of shards."""
TOKENIZER_BYTES = 2**28
"""A file of a tokenizer."""
TURN_CHARACTERS = 100_000
"""What a user says at once: minutes of reading for a small model on a CPU."""
TEMPLATE_CHARACTERS = 2**18
"""A chat template."""


def lifted() -> bool:
    """Whether there are no limits in this process."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def lift() -> None:
    """No limits from now on, in the processes that this one starts too."""
    os.environ[VARIABLE] = "1"


def check(what: str, number: float, most: float) -> None:
    """UserError where `what` is more than `most` and the limits hold."""
    if number > most and not lifted():
        raise UserError(
            f"{what} is {_short(number)}, more than {most:,}; mlx-sleep --no-limits allows it"
        )


def _short(number: float) -> str:
    return f"{number:,}" if abs(number) < 10**18 else "a number of more than 18 digits"
