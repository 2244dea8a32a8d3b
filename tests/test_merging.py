"""LoRA adapters of PEFT and mlx-lm, merged by `convert --merge-adapter`."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_sleep.convert import pipeline
from mlx_sleep.convert.quantize import NumberTypes
from mlx_sleep.convert.verify import verify
from mlx_sleep.models.load import load_model
from mlx_sleep.utils.errors import UserError
from tests.checkpoints import LLAMA, random_weights, write

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder, LLAMA, random_weights(LLAMA))
    return folder


def peft(folder, tensors, **config):
    """A folder as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    fields = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


def halves(rng, layer, shape, rank=3):
    A, B = rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank))
    names = (f"base_model.model.{layer}.lora_{part}.weight" for part in "AB")
    return {name: mx.array(x, mx.float32) for name, x in zip(names, (A, B), strict=True)}


def values(folder):
    return {n: np.array(x) for n, x in tree_flatten(load_model(folder)[0].parameters())}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 6 / 3**0.5),
        ({"alpha_pattern": {"q_proj": 12}}, 4.0),
        ({"rank_pattern": {"self_attn.q_proj": 3}, "r": 8}, 2.0),
    ],
)
def test_pefts_sum(tmp_path, rng, source, config, scale):
    weights = random_weights(LLAMA)
    tensors = halves(rng, Q, weights[f"{Q}.weight"].shape)
    adapter = peft(tmp_path / "adapter", tensors, **config)
    report = pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)
    pipeline.convert(source, tmp_path / "plain")
    plain, merged = values(tmp_path / "plain"), values(tmp_path / "merged")
    A, B = (np.array(x, np.float64) for x in tensors.values())
    np.testing.assert_allclose(
        merged[f"{Q}.weight"], plain[f"{Q}.weight"] + scale * B @ A, atol=1e-5
    )
    changed = {n for n in plain if not np.array_equal(plain[n], merged[n])}
    assert changed == {f"{Q}.weight"}
    rows = {row["name"]: row["how"] for row in report.tensors}
    assert rows[f"{Q}.weight"] == "adapter merged" and report.merged == str(adapter)


def test_embeddings_and_modules_saved_whole(tmp_path, rng, source):
    weights = random_weights(LLAMA)
    vocab, dim = weights["model.embed_tokens.weight"].shape
    A, B = rng.normal(size=(3, vocab)), rng.normal(size=(dim, 3))
    norm = mx.array(rng.normal(size=weights["model.norm.weight"].shape), mx.float32)
    tensors = {
        "base_model.model.model.embed_tokens.lora_embedding_A": mx.array(A, mx.float32),
        "base_model.model.model.embed_tokens.lora_embedding_B": mx.array(B, mx.float32),
        "base_model.model.model.norm.weight": norm,
    }
    pipeline.convert(source, tmp_path / "plain")
    adapter = peft(tmp_path / "adapter", tensors)
    pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)
    plain, merged = values(tmp_path / "plain"), values(tmp_path / "merged")
    name = "model.embed_tokens.weight"
    np.testing.assert_allclose(merged[name], plain[name] + 2 * (B @ A).T, atol=1e-4)
    assert np.array_equal(merged["model.norm.weight"], np.array(norm))


def test_mlx_lms_adapter_gives_what_mlx_lm_computes(tmp_path, rng, source):
    pipeline.convert(source, tmp_path / "plain")
    model, _ = mlx_lm.utils.load_model(tmp_path / "plain")
    lora = {"rank": 3, "scale": 2.5, "dropout": 0.0}
    model.freeze()
    linear_to_lora_layers(model, 1, lora)
    tensors = {
        n: mx.array(rng.normal(size=x.shape), mx.float32)
        for n, x in tree_flatten(model.trainable_parameters())
    }
    assert any(n.endswith("q_proj.lora_a") for n in tensors)
    model.load_weights(list(tensors.items()), strict=False)
    model.eval()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)
    pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)
    x = mx.arange(9)[None]
    ours = load_model(tmp_path / "merged")[0](x)[0]
    theirs = model(x)
    assert mx.abs(theirs - load_model(tmp_path / "plain")[0](x)[0]).max() > 0.1
    assert mx.allclose(ours, theirs, atol=2e-4 * mx.abs(theirs).max().item())


def test_verify_takes_the_adapter_in(tmp_path, rng, source):
    pytest.importorskip("torch")
    weights = random_weights(LLAMA)
    adapter = peft(tmp_path / "a", halves(rng, DOWN, weights[f"{DOWN}.weight"].shape))
    pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)
    found = verify(source, tmp_path / "merged")
    assert found.reference and found.greedy_agreement == 1.0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 5}))
    with pytest.raises(UserError, match="differs most"):
        verify(source, tmp_path / "merged")


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        ({"use_dora": True}, {}, "use_dora true can't be merged"),
        ({"init_lora_weights": "pissa"}, {}, 'init_lora_weights "pissa" can\'t be merged'),
        ({"of_next_year": {"x": 1}}, {}, "of_next_year .* can't be merged"),
        ({"r": 0}, {}, "r must be >= 1"),
        ({"lora_alpha": 10**400}, {}, "lora_alpha must be a number"),
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3' can't be merged"),
        ({"bias": "all"}, {}, 'bias "all" can.t be merged'),
        ({"r": 5}, {}, "has rank 3, the config says 5"),
        ({"lora_alpha": "big"}, {}, "lora_alpha"),
        ({}, {f"base_model.model.{Q}.lora_magnitude_vector": 1}, "can't be merged"),
        ({}, {f"base_model.model.{Q}.lora_A.default.weight": 2}, "is there twice"),
        ({}, {"base_model.model.model.layers.9.x.lora_A.weight": 2}, "one half"),
        ({}, {"base_model.model.model.nrom.weight": 1}, r"which the model has not \(nearest"),
        ({}, {"base_model.model.model.norm.weight": 1}, "an adapter of another model"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path, rng, source, config, change, message):
    weights = random_weights(LLAMA)
    tensors = halves(rng, Q, weights[f"{Q}.weight"].shape)
    tensors |= {name: mx.ones((3,) * axes) for name, axes in change.items()}
    adapter = peft(tmp_path / "adapter", tensors, **config)
    with pytest.raises(UserError, match=message):
        pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)
    assert not (tmp_path / "merged").exists()


def test_a_weight_is_changed_once(tmp_path, rng, source):
    w = random_weights(LLAMA)[f"{Q}.weight"]
    both = {**halves(rng, Q, w.shape), f"base_model.model.{Q}.weight": w}
    with pytest.raises(UserError, match="changes .* twice"):
        pipeline.convert(source, tmp_path / "x", merge_adapter=peft(tmp_path / "a", both))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0", "is truncated or not a safetensors file"),
        (b"\xff" * 64, "is truncated or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (None, "is of type I32"),
    ],
)
def test_a_damaged_adapter_is_named(tmp_path, rng, source, content, message):
    w = random_weights(LLAMA)[f"{Q}.weight"]
    tensors = {n: x.astype(mx.int32) for n, x in halves(rng, Q, w.shape).items()}
    adapter = peft(tmp_path / "adapter", tensors)
    if content is not None:
        (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=message):
        pipeline.convert(source, tmp_path / "merged", merge_adapter=adapter)


def test_a_quantized_base_is_refused(tmp_path, rng, source):
    config = {**LLAMA, "hidden_size": 64}
    weights = random_weights(config)
    write(source, config, weights)
    adapter = peft(tmp_path / "a", halves(rng, Q, weights[f"{Q}.weight"].shape))
    types = NumberTypes(bits=4, group_size=32)
    pipeline.convert(source, tmp_path / "small", types)
    with pytest.raises(UserError, match="is quantized; merge the adapter"):
        pipeline.convert(tmp_path / "small", tmp_path / "merged", merge_adapter=adapter)
    pipeline.convert(source, tmp_path / "both", types, merge_adapter=adapter)


def test_a_folder_without_an_adapter(tmp_path, source):
    with pytest.raises(UserError, match="has no adapter_config.json"):
        pipeline.convert(source, tmp_path / "merged", merge_adapter=source)
