"""Attention-only models of mlx-lm: what it leaves out of them is added, or refused by name."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert import pipeline
from mlx_sleep.convert.architectures import for_source
from mlx_sleep.convert.export import export
from mlx_sleep.models.load import load_model
from mlx_sleep.models.mlx_lm_model import Model, ModelArgs
from mlx_sleep.utils.errors import UserError

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
LONGROPE = {
    **BASE,
    "model_type": "phi3",
    "original_max_position_embeddings": 64,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
}


def make(config: dict, sleep: dict | None = None) -> Model:
    config = for_source(config["model_type"]).config(dict(config))
    return Model(ModelArgs.from_dict({**config, "sleep": {"window": 9, **(sleep or {})}}))


@pytest.mark.parametrize("model_type", ["mistral", "phi3", "gemma2"])
def test_a_sliding_window_slides(model_type):
    """mlx-lm's layers see the whole text."""
    x = mx.arange(13)[None]
    slides, sees_all = (
        make({**BASE, "model_type": model_type, "sliding_window": window}) for window in (4, None)
    )
    slides.update(sees_all.parameters())
    a, b = slides(x)[0], sees_all(x)[0]
    assert mx.allclose(a[:, :4], b[:, :4], atol=1e-5)
    assert mx.abs(a[:, 4:] - b[:, 4:]).max() > 1e-4
    state, steps = slides.init_state(), []
    for t in range(13):
        logits, state = slides(x[:, t : t + 1], state)
        steps.append(logits)
    assert mx.allclose(mx.concatenate(steps, 1), a, atol=1e-5)


def test_layers_that_slide_need_a_window():
    """mlx-lm's cache would fail at the first token."""
    kinds = ["full_attention", "sliding_attention"]
    config = {**BASE, "model_type": "llama", "layer_types": kinds}
    for window in ({}, {"sliding_window": None}, {"sliding_window": 0}):
        with pytest.raises(UserError, match="sliding_window must be a whole number"):
            Model(ModelArgs.from_dict({**config, **window}))


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_layers_that_are_all_alike_have_no_layer_types(model_type):
    """transformers reads none of these two, mlx-lm does."""
    kinds = ["full_attention", "sliding_attention"]
    config = {**BASE, "model_type": model_type, "layer_types": kinds}
    assert "layer_types" not in for_source(model_type).config(config)


def test_longrope_takes_its_short_factors():
    model = make(LONGROPE)
    plain = make({**LONGROPE, "rope_scaling": None})
    rope, none = model.layers[0].self_attn.rope, plain.layers[0].self_attn.rope
    x = mx.random.normal((1, 1, 5, 8))
    assert mx.allclose(rope(x), none(x * rope._scale), atol=1e-5)  # factors of 1


@pytest.mark.parametrize("sleep", [{"window": 65}, {"eviction": "sliding"}])
def test_longrope_is_refused_where_long_factors_would_be_needed(sleep):
    with pytest.raises(UserError, match="LongRoPE is known here for windows of up to 64 tokens"):
        make(LONGROPE, sleep)


def test_gemma_3_with_a_vision_tower_is_its_text_model(tmp_path):
    text = {**BASE, "model_type": "gemma3_text", "sliding_window_pattern": 2}
    model = make(text)
    names = {f"language_model.{n}": x for n, x in tree_flatten(model.parameters())}
    source = tmp_path / "source"
    source.mkdir()
    extra = {"vision_tower.x.weight": mx.ones(3), "multi_modal_projector.y": mx.ones(2)}
    mx.save_safetensors(str(source / "model.safetensors"), {**names, **extra}, {"format": "pt"})
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": 1}
    (source / "config.json").write_text(json.dumps(config))
    report = pipeline.convert(source, tmp_path / "ours", sleep={"window": 9})
    assert sorted(report.dropped) == sorted(extra)
    ours, written = load_model(tmp_path / "ours")
    assert written["model_type"] == "gemma3_text" and written["eos_token_id"] == 1
    x = mx.arange(7)[None]
    assert mx.array_equal(ours(x)[0], model(x)[0])
    export(tmp_path / "ours", tmp_path / "theirs")
    again = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert again["model_type"] == "gemma3_text" and again["hidden_size"] == 32
    assert set(mx.load(str(tmp_path / "theirs" / "model.safetensors"))) == {
        n.removeprefix("language_model.") for n in names
    }


def test_null_is_the_known_value():
    nulls = {"hidden_act": None, "use_bidirectional_attention": None, "hidden_activation": None}
    for model_type in ("llama", "gemma2", "gemma3_text", "smollm3"):
        for_source(model_type).config({**BASE, "model_type": model_type, **nulls})


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("gemma2", {"final_logit_softcapping": None}, "gemma2 without final_logit_softcapping"),
        ("gemma2", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "gemma2 with scaled RoPE"),
        ("gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings False"),
        ("gemma3_text", {"layer_types": ["full_attention", "sliding_attention"]}, "every n-th"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "only longrope"),
        ("smollm3", {"use_sliding_window": True}, "use_sliding_window True"),
        ("mistral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_mlx_lm_would_ignore_is_refused(model_type, fields, message):
    with pytest.raises(UserError, match=message):
        for_source(model_type).config({**BASE, "model_type": model_type, **fields})
