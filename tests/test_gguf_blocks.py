"""Every type of GGUF block against the decoder of the package `gguf`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from mlx_sleep.convert import gguf
from mlx_sleep.convert.gguf_blocks import AFFINE
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.convert.verify import verify
from mlx_sleep.utils.errors import UserError
from tests import ggufs

WIDTH, HEADS, D = 256, 4, 64
CONFIG = {
    **ggufs.CONFIG,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": D,
    "intermediate_size": WIDTH,
}
# Where the float16 scales of a block lie, where that is not its first two bytes.
SCALES = {
    Kind.Q4_1: (0, 2),
    Kind.Q5_1: (0, 2),
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.TQ1_0: (52,),
    Kind.TQ2_0: (64,),
    Kind.MXFP4: (),
    Kind.NVFP4: (),
    Kind.IQ1_M: (),
}
DEQUANTIZED = [
    *(Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K, Kind.Q5_0, Kind.Q5_1),
    *(Kind.IQ4_NL, Kind.IQ4_XS, Kind.IQ3_S, Kind.IQ3_XXS, Kind.IQ2_S, Kind.IQ2_XS, Kind.IQ2_XXS),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4, Kind.NVFP4),
]


def blocks(rng, kind: Kind, rows: int) -> np.ndarray:
    """Random bytes with sensible scales, uint8 [rows, bytes]."""
    if kind == Kind.BF16:
        return quants.quantize(rng.standard_normal((rows, WIDTH)).astype(np.float32), kind)
    size, nbytes = GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * WIDTH // size, nbytes), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        halves = rng.uniform(1e-3, 2e-3, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def model_of(rng, kind: Kind, file) -> dict[str, np.ndarray]:
    """Write a model whose matrices have blocks of a kind; the raw blocks by mlx-lm's names."""
    raw, tensors = {}, {}
    layer = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    layer += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for name in ("model.embed_tokens", *(f"model.layers.0.{part}" for part in layer)):
        x = blocks(rng, kind, CONFIG["vocab_size"] if "embed" in name else WIDTH)
        raw[name] = x
        if name.endswith(("q_proj", "k_proj")):
            x = ggufs.neighbours_first(x, D)
        tensors[ggufs.name_of(f"{name}.weight")] = x, kind
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = np.ones(WIDTH, np.float32), Kind.F32
    ggufs.write(file, tensors, {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata()})
    return raw


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_dequantized_to_the_nearest_float16(tmp_path, rng, kind):
    raw = model_of(rng, kind, tmp_path / "m.gguf")
    read = gguf.read(tmp_path / "m.gguf", tmp_path)
    assert "quantization" not in read.config
    for name, x in raw.items():
        with np.errstate(over="ignore", invalid="ignore"):  # random exponents, for some types
            want = quants.dequantize(x, kind).astype(np.float16)
        assert np.isfinite(want).mean() > 0.3 and np.nanmax(np.abs(want)) > 0
        got = read.tensors[f"{name}.weight"]
        assert got.dtype == mx.float16
        assert np.array_equal(np.array(got), want, equal_nan=True), name


@pytest.mark.parametrize("kind", AFFINE, ids=lambda kind: kind.name)
def test_kept_as_affine_quantization_to_the_bit(tmp_path, rng, kind):
    raw = model_of(rng, kind, tmp_path / "m.gguf")
    read = gguf.read(tmp_path / "m.gguf", tmp_path)
    assert read.config["quantization"] == {"group_size": 32, "bits": AFFINE[kind], "mode": "affine"}
    for name, x in raw.items():
        weight = read.tensors[f"{name}.weight"]
        parts = [read.tensors[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
        got = mx.dequantize(weight, *parts, group_size=32, bits=AFFINE[kind])
        assert np.array_equal(np.array(got), quants.dequantize(x, kind)), name


def test_dequantized_where_the_result_is_quantized_again(tmp_path, rng):
    raw = model_of(rng, Kind.Q4_0, tmp_path / "m.gguf")
    read = gguf.read(tmp_path / "m.gguf", tmp_path, keep_blocks=False)
    got = np.array(read.tensors["model.layers.0.self_attn.q_proj.weight"])
    want = quants.dequantize(raw["model.layers.0.self_attn.q_proj"], Kind.Q4_0)
    assert np.array_equal(got, want.astype(np.float16)) and "quantization" not in read.config


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Kind.F32, mx.float32),
        (Kind.F16, mx.float16),
        (Kind.BF16, mx.bfloat16),
        (Kind.F64, mx.float32),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_floats(tmp_path, rng, kind, dtype):
    tensors = {}
    want = rng.standard_normal((WIDTH, WIDTH)).astype(np.float32)
    if kind == Kind.BF16:
        raw = quants.quantize(want, kind)
        want = quants.dequantize(raw, kind)
    else:
        raw = want.astype({Kind.F16: np.float16, Kind.F64: np.float64}.get(kind, np.float32))
    model_of(rng, Kind.Q8_0, tmp_path / "q.gguf")
    tensors = {"token_embd.weight": (raw, kind), "blk.0.ffn_down.weight": (raw, kind)}
    metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata()}
    metadata["tokenizer.ggml.tokens"] = metadata["tokenizer.ggml.tokens"][:WIDTH]
    metadata["tokenizer.ggml.token_type"] = metadata["tokenizer.ggml.token_type"][:WIDTH]
    metadata["tokenizer.ggml.merges"] = None
    ggufs.write(tmp_path / "m.gguf", tensors, metadata)
    got = gguf.read(tmp_path / "m.gguf", tmp_path).tensors["model.layers.0.mlp.down_proj.weight"]
    assert got.dtype == dtype
    want = want.astype(np.float16) if kind == Kind.F16 else want
    assert np.array_equal(np.array(got.astype(mx.float32)), want.astype(np.float32))


@pytest.mark.parametrize("kind", [Kind.Q8_K, Kind.Q8_1, Kind.I32], ids=lambda kind: kind.name)
def test_types_without_a_decoder_are_refused_by_name(tmp_path, rng, kind):
    model_of(rng, kind, tmp_path / "m.gguf")
    with pytest.raises(UserError, match=f"m.gguf: .* has blocks of type {kind.name}, which cannot"):
        gguf.read(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize(("number", "name"), [(31, "Q4_0_4_4"), (99, "number 99")])
def test_types_that_the_package_does_not_know(tmp_path, rng, number, name):
    model_of(rng, Kind.Q8_0, tmp_path / "m.gguf")
    whole = bytearray((tmp_path / "m.gguf").read_bytes())
    at = whole.index(b"blk.0.ffn_up.weight") + len("blk.0.ffn_up.weight") + 4 + 2 * 8
    assert whole[at] == Kind.Q8_0
    whole[at] = number
    (tmp_path / "m.gguf").write_bytes(whole)
    with pytest.raises(UserError, match=f"blk.0.ffn_up.weight has blocks of type {name}, which"):
        gguf.read(tmp_path / "m.gguf", tmp_path)


# --- verify ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K, Kind.BF16])
def test_verify_compares_with_the_package_gguf_and_transformers(tmp_path, rng, kind):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model_of(rng, kind, tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "ours")
    found = verify(tmp_path / "m.gguf", tmp_path / "ours")
    assert found.reference == "transformers LlamaForCausalLM, weights decoded by the package gguf"
    assert found.max_logit_error < found.bound and found.greedy_agreement == 1.0
    assert (found.rewritten == 0) is (kind not in (Kind.Q4_K, Kind.Q6_K))
