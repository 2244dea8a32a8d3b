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
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..utils.errors import UserError
from ..utils.files import one_line, read_json, reading
from .base import SleepModel
from .compat import has_mlx_lm_model
from .folder import copy_tokenizer, new_folder, write_json
from .weights import abbreviate, check_tensors, not_finite, read_headers, weight_files

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The folder of the model that comes with the package."""

MODEL_TYPES = ("sleep_hybrid", "fla_gated_deltanet", "fla_mamba2", "jet_nemotron", "ouro")
"""Our own architectures: `model_type` is the name of a module beside this one."""

_BLOCK = 64 * 1024


def get_model_classes(model_type: Any) -> tuple[type[SleepModel], type]:
    """The (Model, ModelArgs) of an architecture: ours, or mlx-lm's wrapped. UserError for none."""
    if model_type in MODEL_TYPES:
        module = importlib.import_module(f"{__package__}.{model_type}")
        return module.Model, module.ModelArgs
    if has_mlx_lm_model(model_type):
        from . import mlx_lm_model

        return mlx_lm_model.Model, mlx_lm_model.ModelArgs
    known = ", ".join(MODEL_TYPES)
    raise UserError(
        f"unknown model_type {model_type!r}; mlx-sleep can load {known}, and what mlx-lm can load"
    )


def load(path: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, config) from a model folder; see `load_model`."""
    from .. import chat_template  # here, because it imports all of transformers

    path = Path(path).expanduser()
    model, config = load_model(path, lazy=lazy)
    generation = path / "generation_config.json"
    defaults = {**config, **(read_json(generation) if generation.is_file() else {})}
    eos = defaults.get("eos_token_id")
    return model, chat_template.load(path, [eos] if isinstance(eos, int) else eos), config


def load_model(path: str | Path, *, lazy: bool = False) -> tuple[nn.Module, dict]:
    """(model, config) from a model folder.

    lazy leaves the weights on disk until they are used, and so skips the check for NaN and
    infinity. Raises UserError, in one line, for anything that is wrong with the folder.
    """
    path = Path(path).expanduser()
    config = read_config(path)
    files = weight_files(path)
    tensors = read_headers(files)
    model = build(config, tensors, where=path / "config.json")
    check_tensors(path, model, tensors)

    weights: dict[str, mx.array] = {}
    for file in files:
        weights.update(mx.load(str(file)))
    if not lazy:
        if bad := not_finite(weights):
            raise UserError(
                f"{path} has NaN or infinite weights in {abbreviate(bad)}; download it again"
            )
    model.load_weights(list(weights.items()), strict=True)
    model.eval()
    if not lazy:
        mx.eval(model.parameters())
    return model, config


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
    overwrite         replace what stands at `path`, all of it; refused otherwise

    The folder is written beside `path` under a temporary name, checked, and renamed; see
    `new_folder`. Raises UserError when it can't be written.
    """
    with new_folder(Path(path).expanduser().resolve(), overwrite=overwrite) as folder:
        weights = dict(tree_flatten(model.parameters()))
        if bad := not_finite(weights):
            raise UserError(f"not saved to {folder}: NaN or infinite weights in {abbreviate(bad)}")
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
        if tokenizer_source is not None:
            copy_tokenizer(Path(tokenizer_source).expanduser(), folder)
        seal(folder, config)


def seal(folder: Path, config: dict) -> None:
    """Give a folder with weights its config.json, and check that `load` will read it.

    A short write (full disk) or a config of another model shows here. Raises UserError.
    """
    write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: config[name] for name in ids if config.get(name) is not None}
        write_json(folder / "generation_config.json", kept)
    tensors = read_headers(weight_files(folder))
    check_tensors(folder, build(config, tensors, where=folder / "config.json"), tensors)
    write_json(folder / "config.json", {**config, "fingerprint": fingerprint(folder)})


def fingerprint(path: str | Path) -> str:
    """The identity of a model: a SHA-256 in hexadecimal.

    It covers the architecture's fields of config.json, and of each weights file the size, the
    header (names, shapes, types) and the data: all of it up to 4 MiB, beyond that 64 blocks of
    64 KiB, evenly spaced, so that a model of many gigabytes takes a moment. It tells models
    apart; it is no proof against someone who changes a weight between two blocks.
    """
    path = Path(path).expanduser()
    config = _identity(read_config(path))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in weight_files(path):
        with reading(name), open(name, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            digest.update(b"%d" % size)
            digest.update(file.read(min(start, size)))
            last = size - _BLOCK
            whole = size - start <= 64 * _BLOCK
            for at in range(start, size, _BLOCK) if whole else _spaced(start, last, 64):
                file.seek(at)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


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


def read_config(path: Path) -> dict:
    """The contents of config.json. UserError when there is none or it is no JSON object."""
    if not path.is_dir():
        raise UserError(f"no model folder at {path}; give the path of a folder with a config.json")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json: it is not a model folder")
    return read_json(file)


def build(
    config: dict, tensors: Collection[str] = (), *, where: str | Path = "config.json"
) -> SleepModel:
    """The model that the config describes; its arrays are not evaluated.

    tensors  the names of the weights: a layer is quantized where they have its scales
    where    the file that an error is about
    """
    model_class, args_class = get_model_classes(config.get("model_type"))
    if "model_file" in config:
        raise UserError(
            f"{where} asks to run {config['model_file']!r}: mlx-sleep runs no such code"
        )
    try:
        model = model_class(args_class.from_dict(config))
        if config.get("sleep_layers"):
            from . import inserted

            model = inserted.Inserted(model, config["sleep_layers"])
        if (quantization := config.get("quantization")) is not None:
            nn.quantize(
                model,
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                mode=quantization.get("mode", "affine"),
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
