"""From a model folder back to a PyTorch checkpoint: safetensors with PyTorch's names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..models.checkpoint import TRAINING
from ..models.config import read_config
from ..models.folder import copy_tokenizer, new_folder, write_json
from ..models.weights import read_headers, weight_files
from ..utils.errors import UserError
from ..utils.files import expanded
from ..utils.safetensors import load
from .architectures import for_ours
from .architectures.base import Weights
from .writer import SHARD_BYTES, entry, write_shards

# What this project added to a config. What is about sleep stays: with it the exported folder can be
# converted to the same model again.
_OURS = ("fingerprint", "source_config", "quantization")


def export(
    source: str | Path,
    dest: str | Path,
    *,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the model folder `source` as a PyTorch checkpoint, the new folder `dest`.

    Names, shapes and bits are those of the checkpoint that the folder was converted from, if the
    conversion did not round (a cast; 1 + w of Qwen's norms and Falcon-H1's multipliers, which MLX's
    form has in the weights); tensors that it dropped stay dropped. The config is the checkpoint's
    own. Returns the names of the tensors written.

    UserError for a quantized folder, and for architectures without an exact inverse.
    """
    source, dest = expanded(source), expanded(dest).resolve()
    config = read_config(source)
    model_type = config.get("model_type")
    architecture = for_ours(model_type)
    if architecture is None or not architecture.can_export:
        raise UserError(
            f"{source} cannot be exported: for model_type {model_type!r} no exact way back to "
            "PyTorch is known"
        )
    if config.get("quantization") is not None:
        raise UserError(f"{source} is quantized; export the folder that it was quantized from")
    files = weight_files(source)
    order = read_headers(files)
    weights: Weights = {}
    for file in files:
        weights.update(load(file)[0])
    weights = {name: weights[name] for name in order}
    if architecture.unsanitize is not None:
        theirs = architecture.unsanitize(config, weights)
    else:
        assert architecture.to_theirs is not None
        theirs = dict(architecture.to_theirs(name, x) for name, x in weights.items())
    del weights
    entries = []
    for name in list(theirs):  # popped, so that what was written can be freed
        entries.append(entry(name, theirs.pop(name)))
    names = [e.name for e in entries]
    total, done = sum(e.nbytes for e in entries), 0

    def count(nbytes: int):
        nonlocal done
        done += nbytes
        on_bytes(done, total)

    with new_folder(dest) as folder:
        write_shards(folder, entries, "pt", count, shard_bytes)
        copy_tokenizer(source, folder)
        write_json(folder / "config.json", _config(config, architecture.sources[0]))
    return names


def _config(ours: dict, model_type: str) -> dict:
    kept = {name: x for name, x in ours.items() if name not in _OURS}
    if (theirs := ours.get("source_config")) is None:
        return {**kept, "model_type": model_type}
    sleeps = {name: ours[name] for name in ("sleep", "sleep_layers", TRAINING) if name in ours}
    return {**theirs, **sleeps}
