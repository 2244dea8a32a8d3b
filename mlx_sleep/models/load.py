"""Model folders: config.json, model.safetensors, tokenizer files, as the ecosystem has them.

A folder is checked before it is used: every tensor that the config asks for is there, in its
shape, finite, and nothing else is. No code from a folder is ever run. This module knows the
names of architectures and no more of them; foreign checkpoints are the business of `convert`.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..thoughts import Thinking
from ..utils import schema
from ..utils.errors import UserError
from ..utils.files import expanded, one_line, read_json, reading
from ..utils.safetensors import read_metadata
from . import adapter as adapters
from . import layers, lora
from .base import SleepModel
from .checkpoint import Checkpoint, is_trained
from .compat import has_mlx_lm_model
from .config import Generation, check_quantization, read_config, read_generation_config
from .folder import copy_tokenizer, new_folder, write_json
from .weights import (
    abbreviate,
    check_tensors,
    is_of_text_model,
    not_finite,
    read_headers,
    weight_files,
)

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The folder of the model that comes with the package."""

MODEL_TYPES = ("sleep_hybrid", "fla_gated_deltanet", "fla_mamba2", "jet_nemotron", "ouro")
"""Our own architectures: `model_type` is the name of a module beside this one."""

_BLOCK = 64 * 1024
_WINDOW = 2048  # of models that were not trained to sleep


def get_model_classes(model_type: Any) -> tuple[Callable[[Any], SleepModel], Any]:
    """The (Model, ModelArgs) of an architecture: ours, or mlx-lm's wrapped. UserError for none."""
    if model_type in MODEL_TYPES:
        module = importlib.import_module(f"{__package__}.{model_type}")
        return module.Model, module.ModelArgs
    if has_mlx_lm_model(model_type):
        from . import mlx_lm_model

        return mlx_lm_model.Model, mlx_lm_model.ModelArgs
    shown, known = schema.shown(model_type), ", ".join(MODEL_TYPES)
    raise UserError(
        f"unknown model_type {shown}; mlx-sleep can load {known}, and what mlx-lm can load"
    )


Source = str | Path | Checkpoint
"""A model folder of ours or of mlx-lm's, or what `convert.opening` made of another one."""


def open_folder(path: str | Path) -> Checkpoint:
    """A model folder, its weights not read. UserError where it isn't one of ours or mlx-lm's."""
    path = expanded(path)
    config = read_config(path)
    files = weight_files(path)
    if read_metadata(files[0]).get("format") == "pt":
        raise UserError(
            f"{path} has PyTorch's names; open it with mlx_sleep.open_model, or "
            "convert it: mlx-sleep convert"
        )
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


def _opened(source: Source) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else open_folder(source)


def load(
    source: Source,
    *,
    adapter: str | Path | None = None,
    lazy: bool = False,
    thinking: Thinking = "auto",
) -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, config) from a model folder, ready to run; see `load_model`.

    thinking is that of `ChatTokenizer`.

    On the CPU quantized layers become dense (`dequantize`). UserError, too, for a tokenizer that
    can't be used or has ids for which the embedding has no rows.
    """
    from .. import chat_template  # here, because it imports all of transformers

    opened = _opened(source)
    path = opened.path
    model, config = load_model(opened, adapter_path=adapter, lazy=lazy)
    if not lazy:
        suit_device(model)
    eos = read_generation_config(path).eos_token_ids
    if eos is None:
        eos = Generation(eos_token_id=config.get("eos_token_id")).eos_token_ids
    tokenizer = chat_template.load(path, eos, thinking=thinking)
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
    opened = _opened(source)
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
    opened = _opened(source)
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


def fingerprint(source: Source, adapter_path: str | Path | None = None) -> str:
    """The identity of a model, with its adapter if it has one: a SHA-256 in hexadecimal.

    It covers the architecture's fields of config.json, and of each weights file the size, the
    header (names, shapes, types) and the data: all of it up to 4 MiB, beyond that 64 blocks of
    64 KiB, evenly spaced, so that a model of many gigabytes takes a moment. It tells models
    apart; it is no proof against someone who changes a weight between two blocks.
    """
    opened = _opened(source)
    digest = _digest(_identity(opened.config), opened.files)
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


def build(
    config: dict, tensors: Collection[str] = (), *, where: str | Path = "config.json"
) -> SleepModel:
    """The model that the config describes; its arrays are not evaluated.

    tensors  the names of the weights: a layer is quantized where they have its scales
    where    the file that an error is about
    """
    if "model_file" in config:
        name = schema.shown(config["model_file"])
        raise UserError(f"{where} asks to run {name}: mlx-sleep runs no such code")
    try:
        model_class, args_class = get_model_classes(config.get("model_type"))
        model = model_class(args_class.from_dict(config))
        if config.get("sleep_layers"):
            from . import inserted

            model = inserted.Inserted(model, config["sleep_layers"])
        if model.sleep.fold == "user" and not model.can_fold_user:
            raise UserError('fold "user" needs sleep layers, all of kind delta_attention')
        if (quantization := config.get("quantization")) is not None:
            common = check_quantization(quantization)
            nn.quantize(
                model,
                group_size=common.group_size,
                bits=common.bits,
                mode=common.mode,
                class_predicate=lambda name, module: (
                    hasattr(module, "to_quantized")
                    and f"{name}.scales" in tensors
                    and quantization.get(name, True)
                ),
            )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # whatever a wrong type or size sets off
        raise UserError(f"{where} has a value that does not fit: {one_line(error)}") from error
    return model
