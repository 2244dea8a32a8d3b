"""Sampling: what a generation_config.json asks for, and what mlx-lm makes of it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest

from mlx_sleep.models.adapter import open_adapter
from mlx_sleep.models.load import EMBEDDED, generation_of
from mlx_sleep.sampling import Sampling
from mlx_sleep.session import Session
from mlx_sleep.utils.errors import UserError
from tests.fakes import fake_folder, fake_model, fake_tokenizer


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"do_sample": False, "temperature": 0.6}, Sampling()),
        ({"temperature": 0}, Sampling()),
        ({"do_sample": False, "repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
        ({"do_sample": True}, Sampling(temp=1.0, top_k=50)),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
            Sampling(temp=0.7, top_k=20, top_p=0.8),
        ),
        ({"temperature": 0.6, "top_k": 0, "min_p": 0.1}, Sampling(temp=0.6, min_p=0.1)),
        ({"eos_token_id": 2}, Sampling(temp=0.7, top_k=50)),
        ({"temperature": None, "top_p": None}, Sampling(temp=0.7, top_k=50)),
    ],
)
def test_generation_config(tmp_path, config, sampling):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert Sampling.of(generation_of(tmp_path)) == sampling


@pytest.mark.parametrize(
    "config",
    [{"temperature": "hot"}, {"top_k": 1.5}, {"top_p": True}, {"do_sample": "yes"}, {"top_p": 0}],
)
def test_a_wrong_generation_config_is_named(tmp_path, config):
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"generation_config.json: "):
        Sampling.of(generation_of(tmp_path))


def test_models_trained_to_recall_are_greedy_and_their_folders_say_so():
    assert Sampling.of(generation_of(EMBEDDED)) == Sampling()
    adapter = EMBEDDED.parent / "adapters" / "smollm2"
    assert open_adapter(adapter).generation == {"do_sample": False}
    assert Sampling.of(generation_of(EMBEDDED, adapter)).temp == 0


def draws(sampling, logits, tokens=(), n=200):
    mx.random.seed(0)
    x = mx.array([logits])
    for process in sampling.processors():
        x = process(mx.array(list(tokens)), x)
    sample = sampling.sampler(len(logits))
    return {sample(x - mx.logsumexp(x, axis=-1, keepdims=True)).item() for _ in range(n)}


def test_draws_are_those_of_each_setting():
    logits = [0.0, 1.0, 2.0, 3.0]
    assert draws(Sampling(), logits) == {3}
    assert draws(Sampling(temp=2.0), logits) == {0, 1, 2, 3}
    assert draws(Sampling(temp=2.0, top_k=2), logits) == {2, 3}
    assert draws(Sampling(temp=2.0, top_k=50), logits) == {0, 1, 2, 3}  # more than there are
    assert draws(Sampling(temp=2.0, top_p=0.5), logits) == {3}
    assert draws(Sampling(temp=2.0, min_p=0.3), logits) == {2, 3}
    assert draws(Sampling(repetition_penalty=2.0), logits, tokens=[3]) == {2}


def test_a_repetition_penalty_sees_the_tokens_before_the_next_one():
    model, tokenizer = fake_model(), fake_tokenizer()
    session = Session(model, tokenizer, max_tokens=12, repetition_penalty=1e6, window=400)
    tokenizer.stop_ids = frozenset()
    session.ask("hello")
    reply = session.pending[-12 - len(tokenizer.end_ids) : -len(tokenizer.end_ids)]
    turn = tokenizer.turn("hello", first=True)
    assert len(set(reply)) == 12 and not set(reply) & set(turn)


def test_a_session_samples_as_its_folder_says_and_as_it_is_told(tmp_path):
    folder = fake_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 1, "do_sample": True, "temperature": 0.6, "top_k": 20})
    )
    with Session.open(folder) as session:
        assert session.sampling == Sampling(temp=0.6, top_k=20)
    with Session.open(folder, temp=0.0, top_k=None, min_p=0.1) as session:
        assert session.sampling == Sampling(temp=0.0, top_k=20, min_p=0.1)
        session.sampling = Sampling(temp=1.5)
        session.ask("hello")
