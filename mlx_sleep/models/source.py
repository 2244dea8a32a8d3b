"""Where a model comes from: a folder is opened, its weights not read, and told from all others."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..utils.files import expanded, reading
from ..utils.safetensors import read_metadata
from . import adapter as adapters
from .build import MODEL_TYPES, get_model_classes
from .checkpoint import Checkpoint
from .config import read_config
from .weights import is_of_text_model, read_headers, weight_files

_BLOCK = 64 * 1024
_WINDOW = 2048  # of models that were not trained to sleep

Source = str | Path | Checkpoint
"""A model folder, or what `convert.opening` made of one."""


def open_folder(path: str | Path) -> Checkpoint:
    """A model folder, its weights not read: ours, mlx-lm's, or PyTorch's of a known architecture.
    UserError for any other."""
    path = expanded(path)
    config = read_config(path)
    files = weight_files(path)
    if read_metadata(files[0]).get("format") == "pt":
        from .. import open_model  # the package's face, which knows PyTorch's architectures

        return open_model(path)
    if config.get("model_type") not in MODEL_TYPES and config.get("sleep") is None:
        config["sleep"] = default_sleep(config)
    tensors, mapped = read_headers(files), None
    if not all(map(is_of_text_model, tensors)):
        tensors = {name: x for name, x in tensors.items() if is_of_text_model(name)}
        arrays = Checkpoint(str(path), path, config, tensors, files).arrays()
        mapped = {name: arrays[name] for name in tensors}
    gemma = (
        str(config.get("model_type")).startswith("gemma3") and "tie_word_embeddings" not in config
    )
    if gemma and any(name.endswith("lm_head.weight") for name in tensors):
        config["tie_word_embeddings"] = False  # mlx-lm, too, lets the weights say it
    return Checkpoint(str(path), path, config, tensors, files, mapped)


def default_sleep(config: dict) -> dict:
    """`sleep` of a config.json that says nothing of it: one pass, and a window of 2048 tokens or
    all that the model was trained for."""
    longest = config.get("max_position_embeddings")
    fits = type(longest) is int and 2 <= longest < _WINDOW
    return {"passes": 1, "window": longest if fits else _WINDOW, "eviction": "hard"}


def as_checkpoint(source: Source) -> Checkpoint:
    """What is opened already, as it is; else `open_folder`."""
    return source if isinstance(source, Checkpoint) else open_folder(source)


def fingerprint(source: Source, adapter_path: str | Path | None = None) -> str:
    """The identity of a model, with its adapter if it has one: a SHA-256 in hexadecimal.

    It covers the architecture's fields of config.json, and of each weights file the size, the
    header (names, shapes, types) and the data: all of it up to 4 MiB, beyond that 64 blocks of
    64 KiB, evenly spaced, so that a model of many gigabytes takes a moment. It tells models
    apart; it is no proof against someone who changes a weight between two blocks.
    """
    found = as_checkpoint(source)
    digest = _digest(_identity(found.config), found.files)
    if adapter_path is None:
        return digest.hexdigest()
    adapter = adapters.open_adapter(adapter_path)
    fields = {name: adapter.config.get(name) for name in ("sleep_layers", "sleep", "quantization")}
    added = _digest(fields, [adapter.path / adapters.WEIGHTS])
    return hashlib.sha256(digest.digest() + added.digest()).hexdigest()


def _digest(config: dict, files: list[Path]):
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in files:
        with reading(name), open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 0  # of the data; a .bin has no header
            if name.suffix == ".safetensors":
                start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(b"%d" % size)
            digest.update(file.read(min(start, size)))
            last = size - _BLOCK
            whole = size - start <= 64 * _BLOCK
            for at in range(start, size, _BLOCK) if whole else _spaced(start, last, 64):
                file.seek(at)
                digest.update(file.read(_BLOCK))
    return digest


def _identity(config: dict) -> dict:
    """The fields of a config that make the model what it is."""
    _, args_class = get_model_classes(config.get("model_type"))
    if hasattr(args_class, "fields"):  # mlx-lm's architectures have arguments of their own
        fields = args_class.fields(config)
    else:
        fields = set(inspect.signature(args_class).parameters)
    fields |= {"model_type", "quantization", "sleep_layers"}
    return {name: value for name, value in config.items() if name in fields}


def _spaced(first: int, last: int, count: int) -> Iterator[int]:
    return (first + i * (last - first) // (count - 1) for i in range(count))
