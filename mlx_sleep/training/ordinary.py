"""Ordinary chat that a model makes of itself, so that training can hold it to what it was.

The prompts come the Magpie way (arXiv 2406.08464): the model goes on where a user's turn opens.
The replies are greedy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import mlx.core as mx
import numpy as np

PROMPT_TOKENS, REPLY_TOKENS = 60, 120  # at most


def sample_chat(
    model,
    tokenizer,
    count: int,
    seed: int = 0,
    batch: int = 16,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[tuple[str, str]]:
    """`count` pairs of (a user's message, the reply), or fewer where a model ends few of them.

    tokenizer is a ChatTokenizer with a template. Messages and replies that don't end by
    themselves are dropped. Seeds MLX's random numbers.
    """
    mx.random.seed(seed)
    first, between = tokenizer.parts.first, tokenizer.parts.between
    stops = {between[0], *tokenizer.stop_ids} if between else tokenizer.stop_ids
    chat: list[tuple[str, str]] = []
    for _ in range(3 * -(-count // batch)):
        made = generate(model, [first] * batch, PROMPT_TOKENS, stops, sample=True)
        texts = [tokenizer.decode(ids).strip() for ids, ended in made if ended]
        texts = [text for text in texts if text]
        if not texts:
            continue
        prompts = [tokenizer.turn(text, first=True) for text in texts]
        replies = generate(model, prompts, REPLY_TOKENS, tokenizer.stop_ids)
        for text, (ids, ended) in zip(texts, replies, strict=True):
            reply = tokenizer.decode(ids).strip()
            if ended and reply:
                chat.append((text, reply))
        on_done(min(len(chat), count))
        if len(chat) >= count:
            break
    return chat[:count]


def generate(
    model, prompts: list[list[int]], limit: int, stops: Collection[int], sample: bool = False
) -> list[tuple[list[int], bool]]:
    """(ids without the stop, whether it came to one) for each prompt of ids, at most `limit` each.

    Greedy, or sampled at temperature 1; a batch from a fresh state.
    """
    longest = max(map(len, prompts))
    tokens = mx.array([ids + [0] * (longest - len(ids)) for ids in prompts])
    lengths = mx.array([len(ids) for ids in prompts])
    mask = mx.arange(longest) < lengths[:, None]
    same = all(len(ids) == longest for ids in prompts)
    h, state = model.hidden(tokens, model.init_state(len(prompts)), None if same else mask)
    h = mx.take_along_axis(h, (lengths - 1)[:, None, None], axis=1)
    made: list[np.ndarray] = []
    ended = np.zeros(len(prompts), bool)
    for _ in range(limit):
        logits = model.head(h)[:, 0].astype(mx.float32)
        token = mx.random.categorical(logits) if sample else mx.argmax(logits, axis=-1)
        mx.eval(token, state)
        made.append(np.array(token))
        ended |= np.isin(made[-1], list(stops))
        if ended.all():
            break
        h, state = model.hidden(token[:, None], state)
    results = []
    for row in np.stack(made, axis=1).tolist():
        at = next((i for i, token in enumerate(row) if token in stops), None)
        results.append((row[:at], at is not None))
    return results
