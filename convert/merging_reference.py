"""A LoRA adapter's sums in NumPy, for `verify`: none of the code that merged it is used."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np


def merged(folder: Path, name: str, w: np.ndarray) -> np.ndarray:
    """Weight `name` with the change, or in the form, that the adapter has for it; float64."""
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text())
    peft = (folder / "adapter_model.safetensors").is_file()
    file = folder / ("adapter_model.safetensors" if peft else "adapters.safetensors")
    layer = name.removesuffix(".weight")
    with safe_open(file, "np") as opened:
        names = set(opened.keys())

        def get(part: str) -> np.ndarray | None:
            for prefix in ("base_model.model.", ""):
                if prefix + part in names:
                    return opened.get_tensor(prefix + part).astype(np.float64)
            return None

        if (x := get(name)) is not None:
            return x
        for down, up in _PAIRS if peft else (("lora_a", "lora_b"),):
            a, b = get(f"{layer}.{down}"), get(f"{layer}.{up}")
            if a is None or b is None:
                continue
            if not peft:
                change = a @ b if "embed" in layer else (a @ b).T if a.ndim == 2 else b @ a
                return w + config["lora_parameters"]["scale"] * change
            r = a.shape[0]
            alpha = next(
                (
                    value
                    for pattern, value in (config.get("alpha_pattern") or {}).items()
                    if re.match(rf"(.*\.)?({pattern})$", layer)
                ),
                config.get("lora_alpha", 8),
            )
            scale = alpha / (np.sqrt(r) if config.get("use_rslora") else r)
            return w + scale * ((b @ a).T if "embedding" in down else b @ a)
    return w


_PAIRS = (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B"))
