"""Retrofits of models with fast weights of their own: low-rank changes of mixers and attention."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.models import lora
from mlx_sleep.models.load import build, fuse, load, load_model
from mlx_sleep.session import Session
from mlx_sleep.sleep import consolidate
from mlx_sleep.training.lives import base_hidden, life_batch, life_hidden, life_loss
from mlx_sleep.training.retrofit import prepare_hybrid
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_config
from tests.test_models_mlx_lm import CONFIGS
from tests.test_retrofit import B, W, chat_folder, invoke, lives

MLX_LM = ("qwen3_next", "qwen3_5", "granitemoehybrid")
HYBRIDS = {
    "sleep_hybrid": {k: v for k, v in fake_config().items() if k != "sleep"},
    **{name: {"model_type": name, **CONFIGS[name]} for name in MLX_LM},
}


def model_of(name: str, passes: int = 1):
    mx.random.seed(5)
    config = {**HYBRIDS[name], "sleep": {"passes": passes, "window": 64, "eviction": "hard"}}
    return prepare_hybrid(build(config), lora_rank=2)


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("passes", [1, 2])
def test_windows_are_those_of_a_sleeping_model(rng, name, passes):
    model, arrays = model_of(name, passes), lives(rng)
    stir(model)
    h = life_hidden(model, mx.array(arrays["tokens"]), mx.array(arrays["mask"]), passes)
    for b in range(B):
        state = model.init_state()
        for w in range(W):
            tokens = mx.array(arrays["tokens"][b, w][arrays["mask"][b, w]])[None]
            wanted, _ = model.hidden(tokens, state)
            np.testing.assert_allclose(h[b, w, : tokens.size], wanted[0], atol=5e-4, rtol=5e-4)
            state, _ = consolidate(model, state, tokens, passes)


def stir(model):
    """Low-rank changes that change something."""
    new = [
        (name, 0.1 * mx.random.normal(x.shape))
        for name, x in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(new, strict=False)


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_change_is_trained_and_the_mlp_has_none(rng, name):
    """A mixer that read `weight` past its layer would leave a change without a gradient."""
    model = model_of(name)
    stir(model)
    batch = life_batch(lives(rng))
    base = base_hidden(model, batch)
    (_, _, kl), grads = nn.value_and_grad(model, life_loss)(model, batch, base)
    assert kl.item() > 0
    sizes = {n: mx.abs(x).max().item() for n, x in tree_flatten(grads)}
    assert min(sizes.values()) > 0 and not any("mlp" in n for n in sizes)
    for i, block in enumerate(model.block_modules):
        assert any(f"layers.{i}." in n for n in sizes), f"no change in block {i}, {type(block)}"
    with lora.left_out(model):
        np.testing.assert_array_equal(base, base_hidden(model, batch))


def test_from_a_hybrid_to_a_chat(tmp_path):
    """Trained by the command, opened with the adapter, fused, refused where it doesn't belong."""
    model = chat_folder(tmp_path / "model", "qwen3_next", config=HYBRIDS["qwen3_next"])
    out = tmp_path / "adapter"
    done = invoke(model, "--out", out, "--tokens", 900, "--batch", 300, "--ordinary", 0)
    assert done.exit_code == 0, (done.output, done.exception)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["lora_rank"] == 16 and config["sleep_layers"] == []
    with Session.open(model, adapter=out, max_tokens=4) as session:
        session.tell("My dog is called Rex.")
        assert session.sleep().tokens > 0
    changed, tokenizer, _ = load(model, adapter=out)
    plain, _ = load_model(model)
    tokens = mx.array([tokenizer.encode_text("My dog is called Rex.")])
    (wanted, _), (before, _) = changed(tokens), plain(tokens)
    assert not mx.allclose(wanted, before, atol=1e-4)
    fuse(model, out, tmp_path / "fused")
    fused, _ = load_model(tmp_path / "fused")
    np.testing.assert_allclose(fused(tokens)[0], wanted, atol=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", 0], "--lora-rank must be at least 1"),
        (["--before", "1"], "gets no new layers"),
        (["--fold", "user"], "folds in all"),
    ],
)
def test_wrong_options(tmp_path, hybrid, arguments, message):
    result = invoke(hybrid, "--out", tmp_path / "out", "--tokens", 9, *arguments)
    assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    return chat_folder(folder, "qwen3_next", config=HYBRIDS["qwen3_next"])
