"""GGUF headers that don't hold, split files, RoPE: the right value, or one line."""

from __future__ import annotations

import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten

from mlx_sleep.convert import gguf
from mlx_sleep.convert.pipeline import convert
from mlx_sleep.models.load import build, load_model
from mlx_sleep.utils.errors import UserError
from tests import ggufs
from tests.ggufs import CONFIG

MUTANTS = 300


@pytest.fixture(scope="module")
def tensors():
    mx.random.seed(0)
    return ggufs.tensors(build(CONFIG))


@pytest.fixture
def whole(tmp_path, tensors) -> bytes:
    metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata()}
    return ggufs.write(tmp_path / "whole.gguf", tensors, metadata).read_bytes()


def refusal(file, folder) -> str:
    with pytest.raises(UserError) as error:
        gguf.read(file, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- headers ---------------------------------------------------------------------------------


def test_damaged_files_end_in_one_line(tmp_path, whole):
    """Flipped bits, changed bytes, wild numbers and cuts; a few do no harm."""
    rng = np.random.default_rng(0)
    header = whole.index(b"blk.1.ffn_down.weight") + 64
    file, scratch = tmp_path / "m.gguf", tmp_path / "scratch"
    scratch.mkdir()
    read = 0
    for i in range(MUTANTS):
        data = bytearray(whole)
        at = int(rng.integers(0, header))
        if i % 3 == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif i % 3 == 1:
            wild = [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, int(rng.integers(2**40))]
            data[at : at + 8] = struct.pack("<Q", wild[int(rng.integers(len(wild)))])
        else:
            del data[at + int(rng.integers(2)) * (len(whole) - header) :]
        file.write_bytes(data)
        try:
            config = gguf.read(file, scratch).config
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert config["num_hidden_layers"] == 2
            read += 1
    assert read < MUTANTS // 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:4] + b"\0\0\0\3" + x[8:], "is big-endian"),
        (lambda x: x[:4] + b"\1\0\0\0" + x[8:], "GGUF version 1; versions 2 and 3 can be read"),
        (lambda x: x[:8] + b"\xff" * 8 + x[16:], "goes on beyond its end"),
        (lambda x: x[:16] + b"\xff" * 8 + x[24:], "goes on beyond its end"),
        (lambda x: x[:100], "truncated or damaged"),
        (lambda x: x[:-1], "ends beyond the file"),
        (lambda x: b"", "is empty"),
        (lambda x: x.replace(b"blk.1.attn_k", b"blk.0.attn_k"), "blk.0.attn_k.weight occurs twice"),
        (lambda x: x.replace(b"llama.block_count", b"llama.block_c\xff\xffnt"), "not UTF-8"),
    ],
    ids=range(9),
)
def test_headers_that_do_not_hold(tmp_path, whole, change, message):
    (tmp_path / "m.gguf").write_bytes(change(whole))
    assert message in refusal(tmp_path / "m.gguf", tmp_path)


def test_a_big_endian_file(tmp_path, tensors):
    import gguf as library

    writer = library.GGUFWriter(str(tmp_path / "m.gguf"), "llama", endianess=library.GGUFEndian.BIG)
    writer.add_block_count(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is big-endian" in refusal(tmp_path / "m.gguf", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.alignment": 12}, "an alignment of 12"),
        ({"llama.attention.head_count": 5}, "does not fit 5 heads"),
        ({"llama.attention.head_count": "many"}, "must be a whole number, not 'many'"),
        ({"llama.rope.freq_base": 0.0}, "llama.rope.freq_base must be positive"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4 beside heads of 8"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "rope.scaling.attn_factor cannot be read"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' cannot be read"),
        ({"llama.attention.sliding_window": 9}, "attention.sliding_window cannot be read"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"general.architecture": "gemma2"}, "a model of architecture 'gemma2'; only llama"),
        ({"general.architecture": "phi3"}, "a model of architecture 'phi3'; only llama"),
        ({"general.type": "adapter"}, "is a LoRA adapter, not a model; merge it"),
        ({"tokenizer.ggml.bos_token_id": 262}, "damaged tokenizer.ggml.bos_token_id"),
        ({"tokenizer.ggml.token_type": [1, 3]}, "damaged tokenizer.ggml.token_type"),
        ({"tokenizer.ggml.tokens": [f"<{i}>" for i in range(263)]}, "263 tokens and an embedding"),
    ],
    ids=str,
)
def test_metadata_that_cannot_be_read(tmp_path, tensors, change, message):
    metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata(), **change}
    ggufs.write(tmp_path / "m.gguf", tensors, metadata)
    assert message in refusal(tmp_path / "m.gguf", tmp_path)


# --- split files -----------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path, tensors):
    """Three files of one model, as llama-gguf-split writes them."""
    split = {"split.count": 3, "split.tensors.count": len(tensors)}
    files = []
    for i in range(3):
        metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata()} if i == 0 else {}
        part = dict(list(tensors.items())[i::3])
        file = tmp_path / f"m-{i + 1:05}-of-00003.gguf"
        files.append(ggufs.write(file, part, {**metadata, **split, "split.no": i}))
    return files


def test_the_parts_of_a_split_file_are_joined(tmp_path, whole, parts):
    (tmp_path / "scratch").mkdir()
    want = gguf.read(tmp_path / "whole.gguf", tmp_path / "scratch").tensors
    for file in (parts[0], parts[2]):
        read = gguf.read(file, tmp_path / "scratch")
        assert read.files == parts and read.tensors.keys() == want.keys()
        assert all(mx.array_equal(read.tensors[name], x) for name, x in want.items())
    (tmp_path / "whole.gguf").unlink()
    convert(tmp_path, tmp_path / "ours")
    load_model(tmp_path / "ours")


def test_a_part_that_is_missing_or_misnamed(tmp_path, parts):
    parts[1].rename(tmp_path / "elsewhere")
    assert "lacks m-00002-of-00003.gguf, a part of the model" in refusal(parts[0], tmp_path)
    parts[1].write_bytes(parts[2].read_bytes())
    assert "is another part than its name says" in refusal(parts[0], tmp_path)
    parts[0].rename(tmp_path / "m.gguf")
    assert "is one of 3 parts of a model" in refusal(tmp_path / "m.gguf", tmp_path)


def test_a_folder_of_several_models(tmp_path, whole):
    (tmp_path / "other.gguf").write_bytes(whole)
    with pytest.raises(UserError, match="several GGUF files: other.gguf, whole.gguf; name one"):
        convert(tmp_path, tmp_path / "ours")


# --- RoPE ------------------------------------------------------------------------------------

WIDE = {
    **CONFIG,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 500_000.0,
}


def read_rope(folder, change: dict, freqs: np.ndarray | None = None) -> dict | None:
    mx.random.seed(0)
    model = build(WIDE)
    model.load_weights(
        [(n, 0.3 * mx.random.normal(x.shape)) for n, x in tree_flatten(model.parameters())]
    )
    tensors = ggufs.tensors(model, WIDE["head_dim"])
    if freqs is not None:
        tensors["rope_freqs.weight"] = freqs.astype(np.float32), Kind.F32
    metadata = {**ggufs.metadata(WIDE), **ggufs.bpe_metadata(), **change}
    ggufs.write(folder / "m.gguf", tensors, metadata)
    return gguf.read(folder / "m.gguf", folder).config.get("rope_scaling")


def llama3_divisors(factor: float, high: float, original: int) -> np.ndarray:
    """As llama.cpp's converter computes them, a loop over the frequencies."""
    divisors = []
    for i in range(0, WIDE["head_dim"], 2):
        wave = 2 * np.pi * WIDE["rope_theta"] ** (i / WIDE["head_dim"])
        if wave < original / high:
            divisors.append(1.0)
        elif wave > original:
            divisors.append(factor)
        else:
            smooth = (original / wave - 1.0) / (high - 1.0)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors)


@pytest.mark.parametrize(
    ("factor", "high", "original"), [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (16.0, 8.0, 4096)]
)
def test_frequencies_of_llama_3_1(tmp_path, factor, high, original):
    assert read_rope(tmp_path, {}, llama3_divisors(factor, high, original)) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def test_other_frequencies_are_refused(tmp_path, rng):
    with pytest.raises(UserError, match="rope_freqs.weight is no scaling of Llama 3.1's kind"):
        read_rope(tmp_path, {}, rng.uniform(1, 8, WIDE["head_dim"] // 2))
    with pytest.raises(UserError, match="damaged rope_freqs.weight"):
        read_rope(tmp_path, {}, np.ones(5))
    assert read_rope(tmp_path, {}, np.ones(WIDE["head_dim"] // 2)) is None


@pytest.mark.parametrize(
    ("change", "scaling"),
    [
        ({}, None),
        ({"llama.rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"llama.rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scale_linear": 1.0}, None),
    ],
    ids=str,
)
def test_linear_scaling_by_old_and_new_keys(tmp_path, change, scaling):
    assert read_rope(tmp_path, change) == scaling


# --- the tokenizer ---------------------------------------------------------------------------


def test_text_that_is_split_by_an_unnamed_rule_is_noted(tmp_path, tensors):
    metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata(), "tokenizer.ggml.pre": None}
    ggufs.write(tmp_path / "m.gguf", tensors, metadata)
    (note,) = convert(tmp_path / "m.gguf", tmp_path / "ours").notes
    assert "m.gguf does not say how text is split into words (tokenizer.ggml.pre)" in note


@pytest.mark.parametrize(("told", "added"), [(None, True), (True, True), (False, False)])
def test_llama_3_adds_bos_unless_told_otherwise(tmp_path, tensors, told, added):
    from mlx_sleep.models.load import load

    change = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0}
    change["tokenizer.ggml.add_bos_token"] = told
    metadata = {**ggufs.metadata(CONFIG), **ggufs.bpe_metadata(), **change}
    ggufs.write(tmp_path / "m.gguf", tensors, metadata)
    convert(tmp_path / "m.gguf", tmp_path / "ours")
    tokenizer = load(tmp_path / "ours")[1]
    assert (tokenizer.encode("hello")[0] == 0) is added


@pytest.mark.parametrize("scaled", ["llama3", "linear"])
def test_scaled_rope_is_that_of_transformers(tmp_path, scaled):
    """The reference takes its frequencies from the file, not from our rope_scaling."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mlx_sleep.convert.verify import verify

    if scaled == "linear":
        read_rope(tmp_path, {"llama.rope.scale_linear": 4.0})
    else:
        read_rope(tmp_path, {}, llama3_divisors(8.0, 4.0, 64))
    convert(tmp_path / "m.gguf", tmp_path / "ours")
    found = verify(tmp_path / "m.gguf", tmp_path / "ours")
    assert found.max_logit_error < found.bound and found.greedy_agreement == 1.0
    file = tmp_path / "ours" / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("rope_scaling")["rope_type"] == scaled
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not what transformers LlamaForCausalLM, weights"):
        verify(tmp_path / "m.gguf", tmp_path / "ours")
