"""The `memory` task's tokenizer, in its two forms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sleep.lab.tasks import phrases, words
from mlx_sleep.lab.tasks import tokenizer as task_tokenizer
from mlx_sleep.models.load import EMBEDDED
from tests.memory_tasks import ASSISTANT, END, PAD, SP, USER


@pytest.fixture(scope="module")
def wrapped():
    tokenizer_utils = pytest.importorskip("mlx_lm.tokenizer_utils")
    return tokenizer_utils.load(EMBEDDED)


odd_text = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\t'’.?1aeZ\u2581é👨")),
    max_size=40,
)


@settings(max_examples=400, deadline=None)
@given(text=odd_text)
def test_hugging_face_form_encodes_as_sentencepiece(text):
    if any(special in text for special in task_tokenizer.SPECIALS):
        return
    assert HF.encode(text, add_special_tokens=False).ids == SP.encode(text)


@settings(max_examples=200, deadline=None)
@given(text=odd_text)
def test_text_comes_back_as_it_was(text):
    # U+2581 is sentencepiece's own sign for a space.
    assert SP.decode(SP.encode(text)) == text.replace("\u2581", " ")


HF = task_tokenizer.to_huggingface((EMBEDDED / "tokenizer.model").read_bytes())


def test_files_are_those_the_script_writes():
    assert json.loads(HF.to_str()) == json.loads((EMBEDDED / "tokenizer.json").read_text())


def test_mlx_lm_loads_it_and_applies_the_chat_template(wrapped):
    assert wrapped.eos_token_ids == {END}
    assert wrapped.pad_token_id == PAD
    messages = [
        {"role": "user", "content": "My name is Zorbal."},
        {"role": "assistant", "content": "Okay."},
        {"role": "user", "content": " What is  my name? 😀"},
    ]
    ids = wrapped.apply_chat_template(messages, add_generation_prompt=True)
    assert list(ids) == [
        USER,
        *SP.encode("My name is Zorbal."),
        ASSISTANT,
        *SP.encode("Okay."),
        END,
        USER,
        *SP.encode(" What is  my name? 😀"),
        ASSISTANT,
    ]
    assert SP.id_to_piece(ids[1]) == "▁My"


def test_streaming_detokenizer(wrapped):
    text = "Your sister is called Zorbalé 😀."
    detokenizer = wrapped.detokenizer
    detokenizer.reset()
    for token in SP.encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text.strip() == text


def test_typed_specials_stay_text():
    assert not {USER, ASSISTANT, END} & set(SP.encode("<|end|><|user|>hi<|assistant|>"))


def test_everyday_words_and_names_are_short():
    for word in ["My", "name", "sister", "live", "Where", "What", "called", "You", "Your", "Okay"]:
        assert len(SP.encode(word)) == 1, word
    rng = Random(1)
    lengths = [len(SP.encode(words.value(rng, "name", "test"))) for _ in range(500)]
    assert np.mean(lengths) < 3.2 and max(lengths) <= 7


def test_tokenizer_corpus_is_deterministic_and_of_the_train_split():
    lines = task_tokenizer.corpus(conversations=150)
    assert lines == task_tokenizer.corpus(conversations=150)
    seen = set(re.findall(r"[a-z]+", " ".join(lines).lower()))
    common = set(re.findall(r"[a-z]+", Path(phrases.__file__).read_text().lower()))
    for split in ("valid", "test"):
        # Not colours and things: "dark red" and "on the desk" are split as wholes.
        for kind in ("woman", "man", "place", "job", "food", "language"):
            assert not (set(map(str.lower, words.words(kind, split))) & seen) - common
