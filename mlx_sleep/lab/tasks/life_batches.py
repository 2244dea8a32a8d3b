"""Batches of lives as NumPy arrays, made in this process or ahead of time in several others."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...utils.errors import UserError
from .life import CHAT, Exchange, Level, Life, Lives
from .life_tokens import LifeEncoder, Template, fast

ROUND = 16  # windows are padded to a multiple of this, so that few shapes occur


def read_chat(path: str | Path) -> list[list[Exchange]]:
    """Ordinary conversations from a .jsonl file with `user` and `assistant` in each line, and
    `complete`, false where the reply was cut off. UserError names a bad line."""
    chat = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}; make it again") from error
    for number, line in enumerate(lines, 1):
        try:
            item = json.loads(line)
            user, assistant = item["user"].strip(), item["assistant"].strip()
            complete = item.get("complete", True) is not False
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'{path}, line {number}: expected {{"user": "...", "assistant": "..."}}; '
                f"remove the line or make the file again"
            ) from error
        if user and assistant:
            chat.append([Exchange(user, assistant, complete)])
    return chat


def arrays(lives: Sequence[Life], pad: int = 0) -> dict[str, np.ndarray]:
    """A training batch of B lives with W windows each; T is the longest one, rounded up to 16.

    tokens [B, W, T] int32, padded on the right; mask [B, W, T] bool, True on real tokens;
    weight [B, W, T] float32 of predicting a token from those before it in its window (0: not
    learnt); value [B, W, T] bool, tokens that an answer hangs on; reply [B, W, T] bool, tokens that
    the assistant said, end mark included; kl [B, W] bool, windows of ordinary chat only.
    """
    b, w = len(lives), max(len(life.windows) for life in lives)
    t = max(len(window.pieces) for life in lives for window in life.windows)
    t = -(-t // ROUND) * ROUND
    out = {
        "tokens": np.full((b, w, t), pad, np.int32),
        "mask": np.zeros((b, w, t), bool),
        "weight": np.zeros((b, w, t), np.float32),
        "value": np.zeros((b, w, t), bool),
        "reply": np.zeros((b, w, t), bool),
        "kl": np.zeros((b, w), bool),
    }
    for i, life in enumerate(lives):
        for j, window in enumerate(life.windows):
            p, n = window.pieces, len(window.pieces)
            out["tokens"][i, j, :n] = p.ids
            out["mask"][i, j, :n] = True
            out["weight"][i, j, :n] = p.weight
            out["value"][i, j, :n] = p.value
            out["reply"][i, j, :n] = p.reply
            out["kl"][i, j] = window.kl
    out["weight"][:, :, 0] = 0.0  # nothing comes before the first token of a window
    return out


def batch(lives: Lives, indices: Iterable[int], level: Level) -> dict[str, np.ndarray]:
    """arrays() of the lives of these indices."""
    return arrays([lives.life(int(i), level) for i in indices], lives.encoder.template.pad)


@dataclass(frozen=True)
class Source:
    """What a worker process needs to make lives. tokenizer: a tokenizer.json with ChatML marks.
    values: the split of names and values, where it is not that of the wordings."""

    tokenizer: str
    split: str
    seed: int = 0
    chat: CHAT = ()
    pad: int = 0
    values: str = ""

    def lives(self) -> Lives:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(Path(self.tokenizer)))
        for mark in ("<|im_start|>", "<|im_end|>"):
            if tokenizer.token_to_id(mark) is None:
                raise UserError(
                    f"{self.tokenizer} has no token {mark}, and chats are written in ChatML here; "
                    "train the model with mlx-sleep retrofit"
                )
        encode = fast(tokenizer)
        encoder = LifeEncoder(encode, Template.chatml(encode, pad=self.pad))
        return Lives(encoder, self.split, self.seed, self.chat, values=self.values)


_lives: Lives | None = None


def _start(source: Source) -> None:
    global _lives
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each process has one core
    _lives = source.lives()


def _make(job: tuple[Sequence[int], Level]) -> dict[str, np.ndarray]:
    assert _lives is not None  # _start made them
    return batch(_lives, *job)


def stream(
    source: Source, jobs: Iterable[tuple[Sequence[int], Level]], workers: int, ahead: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `jobs`, (indices, level) each, in their order, whatever the number of workers.

    jobs may be endless; `ahead` batches are made before they are asked for (default: two for each
    worker). workers = 0: made here. The worker processes end when the iterator is closed.
    """
    if not workers:
        lives = source.lives()
        for job in jobs:
            yield batch(lives, *job)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, _start, (source,)) as pool:
        waiting: deque = deque()
        ahead = ahead or 2 * workers
        for job in jobs:
            waiting.append(pool.apply_async(_make, (job,)))
            if len(waiting) >= ahead:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()
