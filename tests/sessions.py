"""Sessions of a tiny random model, and what tests ask of them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import mlx.core as mx

from mlx_sleep.memory import Memory
from mlx_sleep.models.base import flatten_state
from mlx_sleep.session import Session
from mlx_sleep.sleep import consolidate
from tests.fakes import fake_model, fake_tokenizer

TOKENIZER = fake_tokenizer()
MODEL = fake_model()
END = TOKENIZER.end_ids


def counters(session):
    """Its stats without the speed of the last reply."""
    return replace(session.stats(), prompt_tps=None, generation_tps=None)


def reopen(tmp_path, **options):
    """A session of the next process."""
    return Session(MODEL, TOKENIZER, Memory.open("test", "fingerprint", home=tmp_path), **options)


def text(length: int) -> str:
    return "".join(random.choices("abcdefghij klmnop", k=length)).strip() + "."


def script(session: Session, reply: str | list[int]):
    """Makes the model say something. Its own samples from random weights have no end."""
    ids = TOKENIZER.encode_text(reply) if isinstance(reply, str) else reply
    stream = itertools.chain(ids, itertools.repeat(END[0]))
    session.sampler = lambda logprobs: mx.array([next(stream)])


def same(a, b, tolerance=0.0) -> bool:
    """States are equal: same arrays, to the bit or nearly."""
    a, b = flatten_state(a), flatten_state(b)
    return a.keys() == b.keys() and all(
        mx.allclose(a[n], b[n], rtol=tolerance, atol=tolerance).item() for n in a
    )


def fold(state, tokens, passes=2):
    return consolidate(MODEL, state, mx.array([list(tokens)]), passes)[0]
