"""Delta attention against its definition in numpy, and as a copy of an attention layer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.insert import insert_into, plan
from mlx_sleep.models.delta_attention import HALF_LIVES, from_attention, sizes_of
from mlx_sleep.models.inserted import SleepLayer
from mlx_sleep.models.layers import dense
from mlx_sleep.models.load import build
from mlx_sleep.utils.errors import UserError

H, D, HIDDEN, K, EPS = 3, 4, 10, 4, 1e-5
LAYER = {"before": 0, "kind": "delta_attention", "num_heads": H, "head_dim": D, "norm_eps": EPS}


def naive(p, h, S, write, conv=None):
    """The layer in float64, one token after the other: (h [T, hidden], S [H, D, D])."""
    out = []
    last = np.zeros((K - 1, 3 * H * D)) if conv is None else conv
    for t, x in enumerate(h):
        x = x / np.sqrt((x * x).mean() + EPS) * p["norm.weight"]
        qkv = np.concatenate([p[f"mixer.{n}_proj.weight"] @ x for n in "qkv"])
        last = np.concatenate([last, qkv[None]])
        q, k, v = (p["mixer.conv_weight"].T * last[-K:]).sum(0).reshape(3, H, D)
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        a = np.exp(-np.logaddexp(0, p["mixer.a_proj.weight"] @ x + p["mixer.dt_bias"]))
        b = 1 / (1 + np.exp(-p["mixer.b_proj.weight"] @ x - p["mixer.b_proj.bias"]))
        if not write[t]:
            a, b = np.ones(H), np.zeros(H)
        o = np.zeros((H, D))
        for i in range(H):
            S[i] = a[i] * S[i] @ (np.eye(D) - b[i] * np.outer(k[i], k[i]))
            S[i] += b[i] * np.outer(v[i], k[i])
            o[i] = S[i] @ q[i]
            o[i] = o[i] / np.sqrt((o[i] * o[i]).mean() + EPS) * p["mixer.o_norm.weight"]
        gate = 2 / (1 + np.exp(-p["mixer.g_proj.weight"] @ x))
        out.append(h[t] + p["gain"] * (p["mixer.o_proj.weight"] @ (o.reshape(-1) * gate)))
    return np.array(out), S


def layer_of(rng):
    """A layer with every parameter drawn, and the same parameters in float64."""
    layer = SleepLayer(HIDDEN, LAYER)
    drawn = {n: rng.normal(0, 0.6, x.shape) for n, x in tree_flatten(layer.parameters())}
    layer.load_weights([(n, mx.array(x, mx.float32)) for n, x in drawn.items()])
    return layer, {n: np.array(x).astype(float) for n, x in tree_flatten(layer.parameters())}


@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_the_definition(rng, T, masked):
    """A chunk from S, its end, and what it leaves, with positions that write nothing."""
    layer, p = layer_of(rng)
    h, S = rng.normal(size=(2, T, HIDDEN)), rng.normal(size=(2, H, D, D))
    write = rng.random((2, T)) < 0.6 if masked else np.ones((2, T), bool)
    state = {"fast_weights": mx.array(S, mx.float32)}
    given = mx.array(write) if masked else None
    out, after = layer(
        mx.array(h, mx.float32), state, None, **({} if given is None else {"write": given})
    )
    for row in range(2):
        wanted, left = naive(p, h[row], S[row].copy(), write[row])
        np.testing.assert_allclose(out[row], wanted, atol=2e-4)
        np.testing.assert_allclose(after["fast_weights"][row], left, atol=2e-4)
    assert after["fast_weights"].dtype == mx.float32


def test_step_by_step_and_padded(rng):
    """Token by token equals the chunk; padding on the right changes neither S nor the context."""
    layer, _ = layer_of(rng)
    h = mx.array(rng.normal(size=(2, 7, HIDDEN)), mx.float32)
    whole, end = layer(h, {}, None)
    state, rows = {}, []
    for t in range(7):
        out, state = layer(h[:, t : t + 1], state, None)
        rows.append(out)
    np.testing.assert_allclose(mx.concatenate(rows, axis=1), whole, atol=1e-4)
    mask = mx.arange(7) < mx.array([[7], [4]])
    out, padded = layer(h, {}, mask)
    _, short = layer(h[1:, :4], {}, None)
    for name in ("fast_weights", "conv"):
        np.testing.assert_allclose(state[name], end[name], atol=1e-4)
        np.testing.assert_allclose(padded[name][1], short[name][0], atol=1e-5)
    np.testing.assert_allclose(out[0], whole[0], atol=1e-5)


def test_nothing_written_nothing_moved(rng):
    layer, _ = layer_of(rng)
    S = mx.array(rng.normal(size=(1, H, D, D)), mx.float32)
    h = mx.array(rng.normal(size=(1, 9, HIDDEN)), mx.float32)
    _, state = layer(h, {"fast_weights": S}, None, write=mx.zeros((1, 9), mx.bool_))
    assert mx.array_equal(state["fast_weights"], S)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_a_copy_of_attention_starts_like_it(rng, name):
    """q, k of unit length and v are attention's for a single token; heads forget as they should."""
    model = host(name)
    quantized = host(name)
    nn.quantize(quantized, group_size=32, bits=8)
    for source in (model, quantized):
        (layer,) = insert_into(source, plan(source, kind="delta_attention", count=1)).sleep_layers
        block = source.block_modules[1]
        attention = block.self_attn
        assert sizes_of(attention) == {"num_heads": 4, "head_dim": 8}
        x = mx.array(rng.normal(size=(1, 1, 32)), mx.float32)
        q = attention.q_norm(attention.q_proj(x).reshape(4, 8))
        k = mx.repeat(attention.k_norm(attention.k_proj(x).reshape(2, 8)), 2, axis=0)
        v = mx.repeat(attention.v_proj(x).reshape(2, 8), 2, axis=0)
        for ours, theirs in ((layer.mixer.q_proj, q), (layer.mixer.k_proj, k)):
            ours = ours(x).reshape(4, 8)
            direction = theirs / mx.linalg.norm(theirs, axis=-1, keepdims=True)
            ours = ours / mx.linalg.norm(ours, axis=-1, keepdims=True)
            np.testing.assert_allclose(ours, direction, atol=1e-4)
        np.testing.assert_allclose(layer.mixer.v_proj(x).reshape(4, 8), v, atol=1e-4)
        assert mx.allclose(layer.mixer.o_proj.weight, dense(attention.o_proj))
        np.testing.assert_allclose(layer.norm(x), block.input_layernorm(x), atol=1e-4)
    decay = -nn.softplus(layer.mixer.dt_bias)
    lives = -np.log(2) / np.array(decay)
    np.testing.assert_allclose([lives[0], lives[-1]], HALF_LIVES, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_other_hosts(name):
    model = host(name)
    (layer,) = insert_into(model, plan(model, kind="delta_attention", before=[2])).sleep_layers
    block = model.block_modules[1]
    start = from_attention(block.self_attn, block.input_layernorm)
    assert mx.array_equal(layer.norm.weight, block.input_layernorm.weight)
    assert mx.array_equal(layer.mixer.k_proj.weight, start["mixer.k_proj.weight"])


def test_what_cannot_be_copied():
    model = build({**CONFIG, "model_type": "sleep_hybrid", "layer_types": ["gated_deltanet"]})
    with pytest.raises(UserError, match="delta_attention copies attention"):
        plan(model, kind="delta_attention", count=1)


CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def host(name):
    mx.random.seed(1)
    gemma = {"sliding_window_pattern": 2} if name == "gemma3_text" else {}
    model = build({**CONFIG, **gemma, "model_type": name})
    for block in model.block_modules:  # norms that are not all ones
        for norm in ("q_norm", "k_norm"):
            if norm in block.self_attn:
                block.self_attn[norm].weight = mx.random.uniform(0.5, 2, (8,))
    return model
