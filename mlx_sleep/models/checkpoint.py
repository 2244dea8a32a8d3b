"""A model that is opened and not yet read: its config, its weights by name, where it came from.

A folder of ours or of mlx-lm's is one as it is. `convert.opening` makes one of PyTorch's, whose
tensors it renames as they are read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..thoughts import Thinking
from ..utils.safetensors import array_bytes
from .weights import digest_of, load_arrays, weights_digest

TRAINING = "sleep_training"
"""The field of config.json that says that a model was trained to sleep: {"tokens": ..., ...}, and
"thinking": "off" where the chat template's switch was off. Who trains writes it; convert, fuse and
export keep it."""

Tensors = dict[str, tuple[str, list[int]]]
"""Name -> (dtype's name, shape)."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load` reads a model from.

    name     what to call it: its path, or its id on Hugging Face
    path     the folder that it was opened from; its tokenizer's files are there
    config   as in a config.json of ours
    tensors  names and shapes as in a folder of ours
    files    the weights files as they are on the disk, for `fingerprint`
    mapped   name -> lazy array, where the files hold other names or shapes
    """

    name: str
    path: Path
    config: dict
    tensors: Tensors
    files: list[Path]
    mapped: dict[str, mx.array] | None = None

    def arrays(self) -> dict[str, mx.array]:
        """The tensors by name, unread."""
        if self.mapped is not None:
            return dict(self.mapped)
        found: dict[str, mx.array] = {}
        for file in self.files:
            found.update(load_arrays(file))
        return found

    def digest(self) -> str:
        """`weights_digest` of the folder that a conversion would write. It reads mapped tensors."""
        if self.mapped is None:
            return weights_digest(self.path)
        return digest_of(
            (name, *self.tensors[name], hashlib.sha256(_head(x)).hexdigest())
            for name, x in self.mapped.items()
        )


def is_trained(config: dict) -> bool:
    """Whether a config says that its model was trained to sleep, on one token or more."""
    found = config.get(TRAINING)
    tokens = found.get("tokens") if isinstance(found, dict) else None
    return type(tokens) is int and tokens > 0


def thinking_in_training(config: dict) -> Thinking:
    """Whether a config says that its model was trained to sleep with thinking turned off; else
    "auto"."""
    found = config.get(TRAINING)
    return "off" if isinstance(found, dict) and found.get("thinking") == "off" else "auto"


def _head(x: mx.array) -> bytes:
    return bytes(array_bytes(x.reshape(-1)[: 4096 // x.dtype.size]))
