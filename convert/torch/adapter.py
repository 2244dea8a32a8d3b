"""Adapters on disk: adapters.safetensors with what was trained, adapter_config.json beside it.

adapter_config.json: {"format": "mlx-sleep-adapter",
  "sleep_layers": [{"before": 6, "kind": "delta_attention", "num_heads": 9, "head_dim": 64,
                    "conv_size": 4, "norm_eps": 1e-5}, ...],
  "sleep": {"passes": 1, "window": 512, "eviction": "hard"},
  "generation": {"do_sample": false}, "lora_rank": 0,
  "base": {"weights": ..., "name": ...}, "trained": {...}}
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ...utils.errors import UserError
from ...utils.files import read_json
from .base import BaseConfig, dense
from .retrofit import AdapterConfig, Retrofit

FORMAT = "mlx-sleep-adapter"
KIND = "delta_attention"


def save_adapter(folder: Path, model: Retrofit, trained: dict, dtype=torch.float32) -> None:
    """Writes both files, each whole or not at all; the config last. trained: what to say of it."""
    a, base = model.adapter, model.config
    layer = {
        "kind": KIND,
        "num_heads": a.num_heads,
        "head_dim": a.head_dim,
        "conv_size": a.conv_size,
        "norm_eps": a.norm_eps,
        **({} if a.read_eps is None else {"read_eps": a.read_eps}),
    }
    config = {
        "format": FORMAT,
        "sleep_layers": [{"before": i, **layer} for i in a.before],
        "sleep": {
            "passes": a.passes,
            "window": a.window,
            "eviction": "hard",
            "fold": a.fold,
            **({"loop_range": list(a.loop_range)} if a.loop_range else {}),
        },
        "generation": {"do_sample": False},
        "lora_rank": a.lora_rank,
        "base": {**_mark(base), "name": base.name},
        "trained": trained,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: x.detach().to("cpu", dtype).contiguous() for n, x in model.state_dict().items()}
    new = folder / "adapters.safetensors.new"
    save_file(tensors, new, metadata={"format": "pt"})
    os.replace(new, folder / "adapters.safetensors")
    new = folder / "adapter_config.json.new"
    new.write_text(json.dumps(config, indent=2))
    os.replace(new, folder / "adapter_config.json")


def _mark(base: BaseConfig) -> dict[str, str]:
    """By what the base is known again."""
    return {"weights": base.weights} if base.weights else {"fingerprint": base.fingerprint}


def read_adapter(folder: Path) -> tuple[AdapterConfig, dict[str, torch.Tensor], dict]:
    """(config, name -> tensor, the whole adapter_config.json). UserError when it is none.

    Matrices that are quantized, as `mlx-sleep convert -q` leaves them, are written out.
    """
    config = read_json(folder / "adapter_config.json")
    layers = config.get("sleep_layers")
    if config.get("format") != FORMAT or not layers:
        raise UserError(f"{folder} holds no {FORMAT}; give the folder that training wrote")
    shapes = [{k: v for k, v in layer.items() if k != "before"} for layer in layers]
    if any(shape != shapes[0] or shape["kind"] != KIND for shape in shapes):
        raise UserError(f"{folder} has sleep layers of several kinds; train it again")
    sleep = config["sleep"]
    adapter = AdapterConfig(
        tuple(layer["before"] for layer in layers),
        **{key: shapes[0][key] for key in ("num_heads", "head_dim", "conv_size", "norm_eps")},
        read_eps=shapes[0].get("read_eps"),
        passes=sleep["passes"],
        window=sleep["window"],
        fold=sleep.get("fold", "all"),
        lora_rank=config["lora_rank"],
        loop_range=tuple(sleep["loop_range"]) if sleep.get("loop_range") else None,
    )
    try:
        tensors = load_file(folder / "adapters.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the adapter in {folder} ({error}); save it again") from error
    return adapter, dense(tensors, config.get("quantization", {})), config
