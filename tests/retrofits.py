"""A tiny retrofit in PyTorch, and lives for it: what its tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from mlx_sleep.convert.torch.base import (  # noqa: E402
    BaseConfig,
)
from mlx_sleep.convert.torch.retrofit import AdapterConfig, Retrofit  # noqa: E402

ROOT = Path(__file__).parent.parent
BASE = BaseConfig(60, 24, 40, 4, 4, 2, 6, 1e4, 1e-5, "f00d", "tiny")
ADAPTER = AdapterConfig(before=(1, 3), num_heads=4, head_dim=6)
B, W, T = 3, 3, 10


@pytest.fixture(autouse=True)
def seeded(rng):
    torch.manual_seed(int(rng.integers(1 << 30)))
    torch.set_num_threads(1)


def tiny_weights(c: BaseConfig = BASE) -> dict[str, torch.Tensor]:
    D, d = c.hidden_size, c.head_dim
    shapes = {"model.embed_tokens": (c.vocab_size, D), "model.norm": (D,)}
    for i in range(c.num_hidden_layers):
        layer = f"model.layers.{i}."
        for name in ("q", "o"):
            shapes[f"{layer}self_attn.{name}_proj"] = (D, D)
        for name in ("k", "v"):
            shapes[f"{layer}self_attn.{name}_proj"] = (c.num_key_value_heads * d, D)
        for name in ("gate", "up"):
            shapes[f"{layer}mlp.{name}_proj"] = (c.intermediate_size, D)
        shapes[f"{layer}mlp.down_proj"] = (D, c.intermediate_size)
        shapes[f"{layer}input_layernorm"] = shapes[f"{layer}post_attention_layernorm"] = (D,)
    return {
        f"{name}.weight": torch.randn(shape).double() * shape[-1] ** -0.5
        if len(shape) == 2
        else 1 + 0.1 * torch.randn(shape).double()
        for name, shape in shapes.items()
    }


def tiny(
    adapter: AdapterConfig = ADAPTER, dtype=torch.float64, stirred=True, **options
) -> Retrofit:
    """A retrofit in float64. stirred: all that is trained is away from its start."""
    model = Retrofit(BASE, tiny_weights(), adapter, dtype=dtype, **{"gain": 0.3, **options})
    if stirred:
        with torch.no_grad():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p)
            for layer in model.sleep_layers:  # forget over a few tokens, so that decay matters
                layer.mixer.dt_bias.fill_(-1.5)
    return model


def lives(rng, rows: int = B, windows: int = W, width: int = T) -> dict[str, np.ndarray]:
    """Random arrays as the engine of lives makes them: padded on the right, odd lengths."""
    lengths = rng.integers(3, width + 1, (rows, windows))
    lengths[0, 0] = width
    mask = np.arange(width) < lengths[..., None]
    reply = mask & (rng.random(mask.shape) < 0.5)
    reply[0, 0, 1] = reply[-1, -1, 1] = True
    weight = np.where(reply, rng.choice([0.0, 0.1, 1.0], mask.shape), 0.0).astype(np.float32)
    weight[..., 0] = 0
    weight[0, 0, 1] = 1
    kl = rng.random((rows, windows)) < 0.2
    kl[0, 0], kl[-1, -1] = False, True
    return {
        "tokens": rng.integers(0, BASE.vocab_size, mask.shape).astype(np.int32) * mask,
        "mask": mask,
        "weight": weight,
        "value": (weight == 1) & (rng.random(mask.shape) < 0.6),
        "reply": reply,
        "kl": kl,
    }


def tensors(arrays) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(arrays["tokens"]).long(), torch.from_numpy(arrays["mask"])
