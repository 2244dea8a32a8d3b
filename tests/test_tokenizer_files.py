"""A tokenizer that can't be loaded: one line says why and what to do, whatever the library said."""

from __future__ import annotations

import json

import pytest

from mlx_sleep import chat_template
from mlx_sleep.utils.errors import UserError

OURS = {"AutoTokenizer": ["tokenization_mine.Mine", None]}
REFUSED = {
    "of which nothing can be made": (
        {"vocab.json": {}},
        "there is no tokenizer.json, and transformers makes no tokenizer of vocab.json; download",
    ),
    "code": (
        {"vocab.json": {}, "tokenizer_config.json": {"tokenizer_class": "Mine", "auto_map": OURS}},
        "is Python code of the model's own, which is not run; use",
    ),
    "no model in it": (
        {"tokenizer.json": {"version": "1.0", "added_tokens": []}},
        "; download its files again",
    ),
    "another object": ({"tokenizer.json": {}}, "Error: "),
}


@pytest.mark.parametrize(("files", "why"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, files, why):
    for name, value in {"config.json": {"model_type": "none"}, **files}.items():
        (tmp_path / name).write_text(json.dumps(value))
    with pytest.raises(UserError) as error:
        chat_template.load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"the tokenizer in {tmp_path} cannot be loaded: ")
    assert why in message and "\n" not in message
