"""Model folders: config.json, model.safetensors, tokenizer files, as the ecosystem has them.

A folder is checked before it is used: every tensor that the config asks for is there, in its
shape, finite, and nothing else is. No code from a folder is ever run. Foreign checkpoints are the
business of `convert`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..thoughts import Thinking
from ..utils.errors import UserError
from ..utils.files import expanded, read_json
from . import adapter as adapters
from . import layers, lora
from .base import SleepModel
from .build import build
from .checkpoint import Checkpoint, is_trained, thinking_in_training
from .config import Generation, read_generation_config
from .folder import copy_tokenizer, new_folder, write_json
from .source import Source, as_checkpoint, fingerprint
from .weights import (
    abbreviate,
    check_tensors,
    not_finite,
    read_headers,
    weight_files,
)

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The folder of the model that comes with the package."""


def load(
    source: Source,
    *,
    adapter: str | Path | None = None,
    lazy: bool = False,
    thinking: Thinking = "auto",
) -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, config) from a model folder, ready to run; see `load_model`.

    thinking is that of `ChatTokenizer`; "auto" is as the model was trained to sleep, where its
    config says so.

    On the CPU quantized layers become dense (`dequantize`). UserError, too, for a tokenizer that
    can't be used or has ids for which the embedding has no rows.
    """
    from .. import chat_template  # here, because it imports all of transformers

    opened = as_checkpoint(source)
    path = opened.path
    model, config = load_model(opened, adapter_path=adapter, lazy=lazy)
    if not lazy:
        suit_device(model)
    eos = read_generation_config(path).eos_token_ids
    if eos is None:
        eos = Generation(eos_token_id=config.get("eos_token_id")).eos_token_ids
    trained = thinking_in_training(config)
    tokenizer = chat_template.load(path, eos, thinking=thinking, trained=trained)
    _check_ids(path, tokenizer, model.vocab_rows)
    return model, tokenizer, config


def check_tokenizer(path: Path, model: SleepModel) -> None:
    """UserError where a folder's tokenizer has ids for which the model has no rows. No tokenizer
    passes, and one that no chat can use: the weights are of use without."""
    from .. import chat_template

    try:
        tokenizer = chat_template.load(path)
    except UserError:
        return
    _check_ids(path, tokenizer, model.vocab_rows)


def _check_ids(path: Path, tokenizer: Any, rows: int) -> None:
    if tokenizer.largest_id >= rows:
        raise UserError(
            f"the tokenizer in {path} is of another model: its ids go up to "
            f"{tokenizer.largest_id}, and the model has {rows}; download it again"
        )


def generation_of(path: str | Path, adapter: str | Path | None = None) -> Generation:
    """A model's generation_config.json, with an adapter's `generation` over it. UserError for a
    wrong type, by the field's name."""
    mine = {} if adapter is None else adapters.open_adapter(adapter).generation
    return read_generation_config(expanded(path), mine)


def load_model(
    source: Source, *, adapter_path: str | Path | None = None, lazy: bool = False
) -> tuple[nn.Module, dict]:
    """(model, config) from a model folder, with the adapter of another folder where one is given.

    lazy leaves the weights on disk until they are used, and so skips the check for NaN and
    infinity. Raises UserError, in one line, for anything that is wrong with a folder, and for an
    adapter of another model.
    """
    model, config, weights = read_model(source, adapter_path, lazy=lazy)
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model, config


def read_model(
    source: Source, adapter_path: str | Path | None = None, *, lazy: bool = False
) -> tuple[nn.Module, dict, dict[str, mx.array]]:
    """(model without its weights, config, weights in the files' number types); see `load_model`.

    The adapter's weights are in the dtype of the model's h, but for the decay of S in float32.
    """
    opened = as_checkpoint(source)
    path, config, tensors = opened.path, opened.config, opened.tensors
    adapter, added = None, {}
    if adapter_path is not None:
        adapter = _adapter_of(opened, adapter_path)
        config = adapter.merge(config)
        added = adapter.tensors
    where = path / "config.json" if adapter is None else adapter.path / adapters.CONFIG
    model = build(config, {*tensors, *added}, where=where)
    model.trained_to_sleep = is_trained(config)
    if adapter is not None and adapter.lora_rank:
        lora.attach(_host(model).block_modules, adapter.lora_rank, adapter.tensors)
    wanted = dict(tree_flatten(model.parameters()))
    theirs = {} if adapter is None else adapters.names_in_model(wanted)
    check_tensors(path, {n: x for n, x in wanted.items() if n not in theirs.values()}, tensors)
    if adapter is not None:
        check_tensors(adapter.path, {n: wanted[mine] for n, mine in theirs.items()}, added)

    weights = opened.arrays()
    if not lazy and (bad := not_finite(weights)):
        raise UserError(
            f"{path} has NaN or infinite weights in {abbreviate(bad)}; download it again"
        )
    if adapter is not None:
        model.load_weights(list(weights.items()), strict=False)
        h, _ = _host(model).hidden(mx.zeros((1, 1), mx.int32))  # lazy: nothing is computed
        loaded = adapter.weights(h.dtype)
        weights.update({mine: loaded[n] for n, mine in theirs.items()})
    return model, config, weights


def _host(model):
    """The model that sleep layers were put into; itself where there are none."""
    return getattr(model, "host", model)


def fuse(source: Source, adapter_path: str | Path, dest: str | Path) -> None:
    """Write the model folder `dest`, of a model and an adapter. UserError as from `load_model`.

    Low-rank changes are added to the projections, which are then no longer quantized.
    """
    opened = as_checkpoint(source)
    model, config, weights = read_model(opened, adapter_path)
    model.load_weights(list(weights.items()), strict=False)
    lora.fold(model, weights)
    with new_folder(expanded(dest).resolve()) as folder:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        copy_tokenizer(opened.path, folder)
        seal(folder, config)
        file = folder / "generation_config.json"
        write_json(file, {**read_json(file), **adapters.open_adapter(adapter_path).generation})


def suit_device(model: nn.Module) -> None:
    """Change the layers of a loaded model into what runs fastest here: dense ones on the CPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        dequantize(model)


def dequantize(model: nn.Module) -> None:
    """Quantized layers as float32, of a model with less than a billion weights (4 GB then).

    On the CPU MLX multiplies a quantized matrix by one token after the other; a dense one goes
    to BLAS, and a window of 512 tokens is read some fifty times as fast.
    """
    found = [(n, m) for n, m in model.named_modules() if type(m) in _DENSE]
    if sum(m.weight.size * 32 // m.bits for _, m in found) >= 10**9:
        return
    dense = [(name, _DENSE[type(module)](module)) for name, module in found]
    if dense:
        model.update_modules(tree_unflatten(dense))
        rest = dict(tree_flatten(model.parameters()))
        half = [(n, x.astype(mx.float32)) for n, x in rest.items() if x.dtype in _HALF]
        model.load_weights(half, strict=False)


_DENSE: dict[type, Callable[..., nn.Module]] = {
    nn.QuantizedLinear: layers.dense_linear,
    nn.QuantizedEmbedding: layers.dense_embedding,
}
_HALF = (mx.float16, mx.bfloat16)


def _adapter_of(opened: Checkpoint, adapter_path: str | Path) -> adapters.Adapter:
    """The adapter, which is one of this model. UserError for one of another."""
    adapter = adapters.open_adapter(adapter_path)
    if "weights" in adapter.base:
        same = adapter.base["weights"] == opened.digest()
    else:  # as PyTorch's trainer writes it
        same = adapter.base.get("fingerprint") == fingerprint(opened)
    if not any(adapter.base.get(mark) for mark in ("weights", "fingerprint")):
        raise UserError(
            f"{adapter.path / adapters.CONFIG} doesn't say which model the adapter was trained in; "
            "train it where MLX is installed, which reads the model's weights"
        )
    if not same:
        name = adapter.base.get("name", "another model")
        raise UserError(
            f"the adapter {adapter.path} was trained in {name}, and {opened.path} is another model"
        )
    return adapter


def save(
    path: str | Path,
    model: nn.Module,
    config: dict,
    tokenizer_source: str | Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model folder that `load` reads, whole or not at all.

    config            the contents of config.json; its fields must describe `model`
    tokenizer_source  a folder whose tokenizer files and generation_config.json are copied
    overwrite         replace what is at `path`, all of it; refused otherwise

    The folder is written beside `path` under a temporary name, checked, and renamed; see
    `new_folder`. Raises UserError when it can't be written.
    """
    with new_folder(expanded(path).resolve(), overwrite=overwrite) as folder:
        weights = dict(tree_flatten(model.parameters()))
        if bad := not_finite(weights):
            raise UserError(f"not saved to {folder}: NaN or infinite weights in {abbreviate(bad)}")
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        if tokenizer_source is not None:
            copy_tokenizer(expanded(tokenizer_source), folder)
        seal(folder, config)


def seal(folder: Path, config: dict) -> None:
    """Give a folder with weights its config.json, and check that `load` will read it.

    A short write (full disk) or a config of another model shows here. Raises UserError.
    """
    config = {name: x for name, x in config.items() if name != "auto_map"}  # code to run
    write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: config[name] for name in ids if config.get(name) is not None}
        write_json(folder / "generation_config.json", kept)
    tensors = read_headers(weight_files(folder))
    model = build(config, tensors, where=folder / "config.json")
    check_tensors(folder, dict(tree_flatten(model.parameters())), tensors)
    write_json(folder / "config.json", {**config, "fingerprint": fingerprint(folder)})
