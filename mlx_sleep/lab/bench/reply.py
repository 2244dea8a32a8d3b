"""A reply of a session against mlx-lm's own generation (`mlx-sleep bench reply`).

Both have the same layers and weights and read the same ids; a model's sleep layers are ours alone,
and a cost that mlx-lm does not have. What a session does for its memory's files is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import NaiveStreamingDetokenizer

from ...chat_template import ChatTokenizer
from ...session import Session
from ...utils.errors import UserError
from ..statistics import ratio
from ..timing import interleave

WINDOWS = (100, 1000, 4000)
REPLY = 32  # tokens of a reply that are timed
SENTENCE = "The cat sat on the mat. "


def rows(
    model,
    tokenizer: ChatTokenizer,
    windows: Sequence[int] = WINDOWS,
    repeats: int = 5,
) -> Iterator[dict]:
    """A row for each number of tokens in the window when the first reply begins.

    window      tokens before the first round; each round adds a short turn and a reply
    tokens_per_s, mlx_lm_tokens_per_s  of a greedy reply after its first token, the median
    ratio       the session's tokens a second over mlx-lm's, the median over rounds

    UserError for a model that mlx-lm cannot run.
    """
    inner = getattr(getattr(model, "host", model), "inner", None)
    if inner is None:
        raise UserError("mlx-lm can't run this model; choose one of mlx-lm's with --model")
    sampler = _endless(tokenizer)
    for window in sorted(set(windows)):
        sentence = len(tokenizer.encode_text(SENTENCE))
        text = SENTENCE * max(1, window // sentence)
        room = window + sentence + (repeats + 3) * (REPLY + 100)
        session = Session(model, tokenizer, window=room, max_tokens=1)
        session.ask(text)
        session.max_tokens, session.sampler = REPLY, sampler
        cache = make_prompt_cache(inner)
        inner(mx.array([session.pending]), cache=cache)
        mx.eval([layer.state for layer in cache])
        read = len(session.pending)
        theirs = _mlx_lm_clock(inner, tokenizer, sampler, cache)
        ours, generated = interleave([_session_clock(session), theirs], repeats)
        yield {
            "window": read,
            "tokens_per_s": 1 / statistics.median(ours),
            "mlx_lm_tokens_per_s": 1 / statistics.median(generated),
            "ratio": ratio(generated, ours),
        }


def plot(rows: list[dict], axes) -> None:
    """Tokens a second over tokens in the window."""
    x = [row["window"] for row in rows]
    axes.plot(x, [row["tokens_per_s"] for row in rows], marker="o", label="session")
    axes.plot(x, [row["mlx_lm_tokens_per_s"] for row in rows], marker="o", label="mlx-lm")
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens in the window")
    axes.set_ylabel("tokens a second")
    axes.legend()


def _endless(tokenizer: ChatTokenizer) -> Callable[[mx.array], mx.array]:
    """A greedy sampler that never ends a reply, so that all replies are of one length."""
    rows = mx.arange(len(tokenizer))
    ends = mx.any(rows[:, None] == mx.array(sorted(tokenizer.stop_ids)), axis=1)
    mask = mx.where(ends, -float("inf"), 0.0)
    return lambda logprobs: mx.argmax(logprobs[:, : len(tokenizer)] + mask, axis=-1)


def _session_clock(session: Session) -> Callable[[], float]:
    """Seconds a token of the rest of a reply after its first piece."""

    def seconds() -> float:
        pieces = session.say("And then?")
        next(pieces)
        before, start = len(session.pending), time.perf_counter()
        for _ in pieces:
            pass
        end = len(session.tokenizer.end_ids)
        return (time.perf_counter() - start) / (len(session.pending) - end - before)

    return seconds


def _mlx_lm_clock(inner, tokenizer: ChatTokenizer, sampler, cache: list) -> Callable[[], float]:
    """The same of what mlx_lm.generate does: its `generate_step`, and text from each token."""

    def seconds() -> float:
        turn = mx.array(tokenizer.turn("And then?", first=False))
        options = {"max_tokens": REPLY, "prompt_cache": cache, "sampler": sampler}
        replies = generate_step(turn, inner, **options)
        detokenizer = NaiveStreamingDetokenizer(tokenizer)
        detokenizer.add_token(next(replies)[0])
        start = time.perf_counter()
        for token, _ in replies:
            detokenizer.add_token(token)
            assert detokenizer.last_segment is not None
        return (time.perf_counter() - start) / (REPLY - 1)

    return seconds
