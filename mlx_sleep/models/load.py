"""Model folders: config.json, model.safetensors, tokenizer files, as the ecosystem has them.

A folder is checked before it is used: every tensor that the config asks for is there, in its
shape, finite, and nothing else is. No code from a folder is ever run. This module knows the
names of architectures and no more of them; foreign checkpoints are the business of `convert`.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import inspect
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import UserError

EMBEDDED = Path(__file__).parent.parent / "embedded"
"""The folder of the model that comes with the package."""

MODEL_TYPES = ("sleep_hybrid",)
"""The architectures: `model_type` is the name of a module beside this one."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U32": 4, "U8": 1}
_KINDS = {mx.uint32: ("U32",), mx.uint8: ("U8",)}  # quantized weights; all else is floating
_FLOATS = ("F32", "F16", "BF16")
# Exponent bits: all ones in NaN and infinity.
_EXPONENT = {
    mx.float32: (mx.uint32, 0x7F800000),
    mx.float16: (mx.uint16, 0x7C00),
    mx.bfloat16: (mx.uint16, 0x7F80),
}
_INDEX = "model.safetensors.index.json"
_BLOCK = 64 * 1024


def get_model_classes(model_type: Any) -> tuple[type[nn.Module], type]:
    """The (Model, ModelArgs) of an architecture. UserError for an unknown one."""
    if model_type not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise UserError(f"unknown model_type {model_type!r}; mlx-sleep can load: {known}")
    module = importlib.import_module(f"{__package__}.{model_type}")
    return module.Model, module.ModelArgs


def load(path: str | Path, *, lazy: bool = False) -> tuple[nn.Module, Any, dict]:
    """(model, tokenizer, config) from a model folder; see `load_model`."""
    from .. import tokenizer  # here, because it imports all of transformers

    path = Path(path).expanduser()
    model, config = load_model(path, lazy=lazy)
    generation = path / "generation_config.json"
    defaults = {**config, **(_read_json(generation) if generation.is_file() else {})}
    eos = defaults.get("eos_token_id")
    return model, tokenizer.load(path, [eos] if isinstance(eos, int) else eos), config


def load_model(path: str | Path, *, lazy: bool = False) -> tuple[nn.Module, dict]:
    """(model, config) from a model folder.

    lazy leaves the weights on disk until they are used, and so skips the check for NaN and
    infinity. Raises UserError, in one line, for anything that is wrong with the folder.
    """
    path = Path(path).expanduser()
    config = read_config(path)
    files = _weight_files(path)
    tensors = _read_headers(files)
    model = _build(path, config, tensors)
    _check_tensors(path, model, tensors)

    weights: dict[str, mx.array] = {}
    for file in files:
        weights.update(mx.load(str(file)))
    if not lazy:
        if bad := _not_finite(weights):
            raise UserError(f"{path} has NaN or infinite weights in {_some(bad)}; get it anew")
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

    The folder is written beside `path` under a temporary name, checked, and renamed. With
    `overwrite` there are two renames: a crash between them leaves the old folder whole beside
    the new place, under a name ending in `.old`. Raises UserError when it can't be written.
    """
    path = Path(path).expanduser().resolve()
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists already; choose another name")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.mkdir()
        try:
            _write(fresh, model, config, tokenizer_source)
            _put_in_place(fresh, path)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    except UserError as error:  # the check of the fresh folder
        raise UserError(str(error).replace(str(fresh), str(path))) from error
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError
        raise UserError(f"cannot write the model folder {path}: {_words(error)}") from error


def fingerprint(path: str | Path) -> str:
    """The identity of a model: a SHA-256 in hexadecimal.

    It covers the architecture's fields of config.json, and of each weights file the size, the
    header (names, shapes, types) and the data: all of it up to 4 MiB, beyond that 64 blocks of
    64 KiB, evenly spaced, so that a model of many gigabytes takes a moment. It tells models
    apart; it is no proof against someone who changes a weight between two blocks.
    """
    path = Path(path).expanduser()
    config = read_config(path)
    _, args_class = get_model_classes(config.get("model_type"))
    fields = {*inspect.signature(args_class).parameters, "quantization"}
    config = {name: value for name, value in config.items() if name in fields}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in _weight_files(path):
        with _reading(name), open(name, "rb") as file:
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


def _spaced(first: int, last: int, count: int) -> Iterator[int]:
    return (first + i * (last - first) // (count - 1) for i in range(count))


def read_config(path: Path) -> dict:
    """The contents of config.json. UserError when there is none or it is no JSON object."""
    if not path.is_dir():
        raise UserError(f"no model folder at {path}; give the path of a folder with a config.json")
    file = path / "config.json"
    if not file.is_file():
        raise UserError(f"{path} has no config.json: it is not a model folder")
    return _read_json(file)


def _read_json(file: Path) -> dict:
    with _reading(file):
        text = file.read_bytes()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {_words(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold one JSON object")
    return value


def _weight_files(path: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names."""
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    if not (path / _INDEX).is_file():
        raise UserError(f"{path} has neither model.safetensors nor {_INDEX}")
    names = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{path / _INDEX} has no weight_map")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        if Path(name).name != name:
            raise UserError(f"{path / _INDEX} names {name!r}, which is outside the folder")
        if not (path / name).is_file():
            raise UserError(f"{path} lacks the weights file {name} that its index names")
        files.append(path / name)
    return files


def _read_headers(files: list[Path]) -> dict[str, tuple[str, list[int]]]:
    """Name -> (dtype, shape) of every tensor in the files, from their headers alone.

    The sizes are checked here because MLX reads weights lazily, when an error can no longer be
    told to anyone.
    """
    tensors: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        for name, entry in _read_header(file).items():
            if name in tensors:
                raise UserError(f"{file} repeats the tensor {name} of another weights file")
            tensors[name] = entry
    return tensors


def _read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    with _reading(file), open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{file} is truncated or not a safetensors file")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors, ends = {}, [0]
        for name, entry in header.items():
            dtype, shape = entry["dtype"], [int(n) for n in entry["shape"]]
            start, end = entry["data_offsets"]
            if dtype not in _ITEM_BYTES:
                known = ", ".join(_ITEM_BYTES)
                raise UserError(f"{file}: {name} has type {dtype}; known types: {known}")
            if end - start != math.prod(shape) * _ITEM_BYTES[dtype] or min(start, *shape, 0) < 0:
                raise ValueError(name)
            tensors[name] = dtype, shape
            ends.append(end)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UserError(f"{file} has a damaged header; get it anew") from error
    if size < 8 + length + max(ends):
        missing = 8 + length + max(ends) - size
        raise UserError(f"{file} is truncated: {missing} bytes are missing; get it anew")
    return tensors


def _build(path: Path, config: dict, tensors) -> nn.Module:
    """The model that the config describes, quantized where the tensors are; nothing evaluated."""
    model_class, args_class = get_model_classes(config.get("model_type"))
    file = path / "config.json"
    try:
        model = model_class(args_class.from_dict(config))
        if (quantization := config.get("quantization")) is not None:
            nn.quantize(
                model,
                group_size=quantization["group_size"],
                bits=quantization["bits"],
                mode=quantization.get("mode", "affine"),
                class_predicate=lambda name, module: (
                    hasattr(module, "to_quantized") and f"{name}.scales" in tensors
                ),
            )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    except Exception as error:  # whatever a wrong type or size sets off
        raise UserError(f"{file} has a value that does not fit: {_words(error)}") from error
    return model


def _check_tensors(path: Path, model: nn.Module, tensors) -> None:
    """UserError unless the tensors are the model's: same names, shapes and kinds."""
    wanted = dict(tree_flatten(model.parameters()))
    if missing := [name for name in wanted if name not in tensors]:
        nearest = _nearest(missing[0], tensors, wanted)
        raise UserError(f"{path} lacks weights: {_some(missing)}{nearest}")
    if unexpected := [name for name in tensors if name not in wanted]:
        raise UserError(f"{path} has weights that its config does not ask for: {_some(unexpected)}")
    wrong = []
    for name, array in wanted.items():
        dtype, shape = tensors[name]
        if shape != list(array.shape):
            wrong.append(f"{name} is {shape}, not {list(array.shape)}")
        elif dtype not in _KINDS.get(array.dtype, _FLOATS):
            wrong.append(f"{name} is of type {dtype}")
    if wrong:
        raise UserError(f"the weights in {path} do not fit its config: {_some(wrong)}")


def _nearest(missing: str, tensors, wanted) -> str:
    spare = [name for name in tensors if name not in wanted]
    close = difflib.get_close_matches(missing, spare, n=1)
    return f"; nearest to {missing} is {close[0]}" if close else ""


def _some(items: list[str], most: int = 3) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def _not_finite(weights: dict[str, mx.array]) -> list[str]:
    """The names of arrays that hold a NaN or an infinity."""
    bad = []
    for name, x in weights.items():
        if x.dtype not in _EXPONENT:
            continue
        bits, ones = _EXPONENT[x.dtype]
        if (mx.view(x, bits) & ones).max().item() == ones:  # 10 times faster than mx.isfinite
            bad.append(name)
    return bad


def _write(folder: Path, model: nn.Module, config: dict, tokenizer_source) -> None:
    weights = dict(tree_flatten(model.parameters()))
    if bad := _not_finite(weights):
        raise UserError(f"not saved to {folder}: NaN or infinite weights in {_some(bad)}")
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    if tokenizer_source is not None:
        source = Path(tokenizer_source).expanduser()
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    _write_json(folder / "config.json", config)
    if not (folder / "generation_config.json").exists():
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {name: config[name] for name in ids if config.get(name) is not None}
        _write_json(folder / "generation_config.json", kept)
    # A short write (full disk) or a config of another model shows here, before the rename.
    tensors = _read_headers([folder / "model.safetensors"])
    _check_tensors(folder, _build(folder, config, tensors), tensors)
    _write_json(folder / "config.json", {**config, "fingerprint": fingerprint(folder)})
    for file in folder.iterdir():
        _fsync(file)
    _fsync(folder)


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _put_in_place(fresh: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    replacing = os.path.lexists(path)
    if replacing:
        os.rename(path, old)
    try:
        os.rename(fresh, path)
    except OSError:
        if replacing:
            os.rename(old, path)
        raise
    _fsync(path.parent)
    if replacing and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    elif replacing:
        old.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {file}: {_words(error)}") from error


def _words(error: BaseException) -> str:
    """An exception's message on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
