"""The tokenizers library panics at some files, which is no exception of Python's."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from mlx_sleep import chat_template
from mlx_sleep.convert import gguf_tokenizer
from mlx_sleep.tokens import Tokens
from mlx_sleep.utils.errors import UserError
from tests import ggufs

METADATA = ggufs.bpe_metadata()
# An empty token in place of what the last merge makes.
TOKENS = [*METADATA["tokenizer.ggml.tokens"][:-1], ""]


def test_of_a_gguf(tmp_path):
    metadata = {**METADATA, "tokenizer.ggml.tokens": TOKENS}
    with pytest.raises(UserError, match="m.gguf has a damaged tokenizer"):
        gguf_tokenizer.write(metadata, tmp_path, tmp_path / "m.gguf")


def test_of_a_folder(tmp_path):
    vocab = {token: i for i, token in enumerate(TOKENS)}
    model = {"type": "BPE", "vocab": vocab, "merges": ["Ġ hello"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="the tokenizer in .* cannot be loaded"):
        chat_template.load(tmp_path)


def test_of_a_text():
    """A regular expression without an end stops at Oniguruma's limit, by a panic."""
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    tokens = Tokens(tokenizer)
    assert tokens.ids(["ab"]) == [0, 1]
    with pytest.raises(UserError, match="can't read that text: .*retry-limit-in-match"):
        tokens.ids(["a" * 60 + "b"])


def test_a_tokenizer_with_neither_marks_nor_bos(tmp_path):
    model = {"type": "BPE", "vocab": {f"t{i}": i for i in range(9)}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "model": model, "added_tokens": []})
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert chat_template.load(tmp_path).largest_id == 8
