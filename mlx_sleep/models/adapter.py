"""Adapters: trained sleep layers apart from the model that they were trained in.

A folder of adapters.safetensors and adapter_config.json:

    format        "mlx-sleep-adapter"
    base          the model: {"weights": ..., "name": ...}; weights is its `weights_digest`
    sleep_layers  as in config.json (`models.inserted`); none for a model with fast weights
    sleep         the fields of SleepConfig that it was trained with; loop_range is the blocks from
                  the first sleep layer on where it isn't given
    quantization  of its matrices, by MLX: {"group_size": 64, "bits": 8}; absent when not quantized
    generation    fields of a generation_config.json: {"do_sample": false} for a model that recalls
    lora_rank     of low-rank changes of the base's attention and mixers; 0 is none
    trained       what the trainer says about the run; tokens, at least, and thinking: "off" where
                  the chat template's switch was off

Tensors are named as in a model with these layers: sleep_layers.0.norm.weight, ..., and
layers.0.self_attn.q_proj.lora_a for low-rank changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import mlx.core as mx

from ..utils import limits, schema
from ..utils.errors import UserError
from ..utils.files import expanded, one_line, read_json
from ..utils.safetensors import read_header
from ..utils.schema import CountOrZero, Range
from . import lora
from .base import SleepConfig
from .checkpoint import TRAINING
from .config import check_quantization
from .folder import new_folder, write_json
from .weights import abbreviate, load_arrays, not_finite

FORMAT = "mlx-sleep-adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


@dataclass
class _Base:
    """The model that an adapter was trained in."""

    name: str | None = None
    weights: str | None = None
    fingerprint: str | None = None


@dataclass
class _Layer:
    """What all kinds of sleep layers have; the rest is read by their own arguments."""

    before: Annotated[int, Range(0, limits.LAYERS)]
    kind: str


@dataclass
class _Fields:
    """The fields of adapter_config.json."""

    base: _Base
    sleep_layers: Annotated[list[dict], Range(0, limits.LAYERS)]
    sleep: dict = field(default_factory=dict)
    quantization: dict | None = None
    generation: dict = field(default_factory=dict)
    lora_rank: CountOrZero = 0
    trained: dict | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, with the contents of its config, and of each tensor (dtype, shape)."""

    path: Path
    config: dict
    tensors: dict[str, tuple[str, list[int]]]

    @property
    def lora_rank(self) -> int:
        return self.config.get("lora_rank", 0)

    @property
    def generation(self) -> dict:
        return self.config.get("generation", {})

    @property
    def base(self) -> dict:
        return self.config["base"]

    def merge(self, config: dict) -> dict:
        """The contents of config.json of the base with this adapter in it."""
        layers = self.config["sleep_layers"]
        if layers and config.get("sleep_layers"):
            raise UserError(f"{self.path}: the model has sleep layers already")
        merged = {name: x for name, x in config.items() if name != "fingerprint"}
        merged["sleep"] = {**(config.get("sleep") or {}), **self.config.get("sleep", {})}
        if layers:
            merged["sleep_layers"] = layers
        merged[TRAINING] = self.config.get("trained")
        if (blocks := config.get("num_hidden_layers")) and layers:
            # Nothing before the first sleep layer depends on S.
            first = min(layers[0].get("before", 0), blocks - 1)
            merged["sleep"].setdefault("loop_range", [first, blocks])
        if mine := self.config.get("quantization"):
            names = [n.removesuffix(".scales") for n in self.tensors if n.endswith(".scales")]
            theirs = config.get("quantization") or dict(mine)
            merged["quantization"] = {**theirs, **{name: dict(mine) for name in names}}
        return merged

    def weights(self, dtype: mx.Dtype) -> dict[str, mx.array]:
        """Its tensors, floating ones in `dtype`, but the decay of S in float32.

        UserError for a NaN or an infinity.
        """
        arrays = load_arrays(self.path / WEIGHTS)
        if bad := not_finite(arrays):
            raise UserError(
                f"{self.path} has NaN or infinite weights in {abbreviate(bad)}; download it again"
            )
        for name, x in arrays.items():
            if x.dtype != mx.uint32:
                arrays[name] = x.astype(mx.float32 if name.endswith("dt_bias") else dtype)
        return arrays


def names_in_model(names: Iterable[str]) -> dict[str, str]:
    """Of a model's parameters, those of an adapter: its own name -> the model's."""
    found = {}
    for name in names:
        stored = name if name.startswith("sleep_layers.") else lora.canonical(name)
        if stored is not None:
            found[stored] = name
    return found


def open_adapter(path: str | Path) -> Adapter:
    """The adapter in a folder, its weights not read. UserError for anything wrong with it."""
    path = expanded(path)
    if not path.is_dir():
        raise UserError(f"no adapter at {path}; give the path of a folder with {CONFIG}")
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise UserError(f"{path} has no {name}: it is not an adapter's folder")
    file = path / CONFIG
    config = {name: x for name, x in read_json(file).items() if x is not None}
    if config.get("format") != FORMAT:
        raise UserError(f'{file} is not of format "{FORMAT}"')
    with schema.naming(file):
        fields = schema.read(_Fields, config)
        SleepConfig.from_dict(fields.sleep)
        for i, layer in enumerate(fields.sleep_layers):
            schema.read(_Layer, layer, f"sleep_layers[{i}].")
        if fields.quantization:
            check_quantization(fields.quantization)
    return Adapter(path, config, read_header(path / WEIGHTS))


def save_adapter(
    path: str | Path,
    weights: dict[str, mx.array],
    config: dict,
    *,
    bits: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write an adapter's folder, whole or not at all.

    weights  its tensors by name, in floating point
    config   adapter_config.json, without format and quantization
    bits     quantize the projections of sleep layers, in groups of 64 (those whose width is a
             multiple of it); None keeps all as they are
    """
    with new_folder(expanded(path).resolve(), overwrite=overwrite) as folder:
        write_adapter(folder, weights, config, bits=bits)
        open_adapter(folder)


def is_adapter(path: str | Path) -> bool:
    """Whether a folder says that it holds an adapter of ours."""
    config = expanded(path) / CONFIG
    return config.is_file() and read_json(config).get("format") == FORMAT


def copy_adapter(source: str | Path, path: str | Path, *, bits: int | None = None) -> None:
    """Write an adapter again, as PyTorch's trainer or `save_adapter` left it, quantized to `bits`.

    UserError where it is quantized already.
    """
    adapter = open_adapter(source)
    if bits is not None and adapter.config.get("quantization"):
        raise UserError(f"{adapter.path} is quantized already; convert the one that it came from")
    names = ("format",) if bits is None else ("format", "quantization")
    config = {name: value for name, value in adapter.config.items() if name not in names}
    save_adapter(path, load_arrays(adapter.path / WEIGHTS), config, bits=bits)


def write_adapter(
    folder: Path, weights: dict[str, mx.array], config: dict, *, bits: int | None = None
) -> None:
    """The two files of `save_adapter` in a folder that is there, each replaced whole."""
    if bad := not_finite(weights):
        raise UserError(f"not saved to {folder}: NaN or infinite weights in {abbreviate(bad)}")
    config = {"format": FORMAT, **config}
    stored = dict(weights)
    if bits is not None:
        config["quantization"] = {"group_size": 64, "bits": bits}
        for name, x in weights.items():
            if _is_matrix(name) and x.shape[1] % 64 == 0:
                parts = mx.quantize(x.astype(mx.float32), group_size=64, bits=bits)
                stem = name.removesuffix(".weight")
                for part, value in zip(("weight", "scales", "biases"), parts, strict=True):
                    stored[f"{stem}.{part}"] = value if part == "weight" else value.astype(_SCALES)
    new = folder / f"new-{WEIGHTS}"
    try:
        mx.save_safetensors(str(new), stored, {"format": "mlx"})
        new.replace(folder / WEIGHTS)
        write_json(folder / f"new-{CONFIG}", config)
        (folder / f"new-{CONFIG}").replace(folder / CONFIG)
    except (OSError, RuntimeError) as error:  # MLX raises RuntimeError for a full disk
        raise UserError(
            f"cannot write the adapter to {folder} ({one_line(error)}); free some space there"
        ) from error


_SCALES = mx.float16


def _is_matrix(name: str) -> bool:
    large = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj")
    return name.startswith("sleep_layers.") and name.split(".")[-2] in large
