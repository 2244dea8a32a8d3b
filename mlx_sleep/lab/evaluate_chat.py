"""What a chat model still knows after sleep, and whether it still is what it was without.

`evaluate_lives` asks about made-up lives, told in the words of a split that nobody trained on, and
`evaluate_natural` about conversations written by hand, whose replies the model makes itself. Tokens
are exactly a session's, answers greedy, and each is asked again with S set to zero. `evaluate_base`
compares the model with its base on ordinary chat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby

import mlx.core as mx
import numpy as np

from ..models.base import State
from ..models.lora import left_out
from ..sleep import consolidate
from . import natural
from .evaluation import pad, zero_fast_weights
from .statistics import wilson

AGES = ((1, 2), (3, 5), (6, 10), (11, 16))
"""Sleeps since a fact was told: how the rows of after_16_sleeps are divided."""
ANSWER_TOKENS, REPLY_TOKENS = 32, 64  # at most: of an answer, and of a reply to what is told

OnDone = Callable[[int, int], None]


def evaluate_lives(
    model,
    tokenizer,
    lives,
    *,
    cases: Iterable[str],
    passes: Iterable[int],
    n: int = 200,
    batch: int = 25,
    on_done: OnDone = lambda done, total: None,
) -> Iterator[dict]:
    """Rows of case, passes, accuracy, low, high (95% Wilson), n, zeroed.

    after_16_sleeps has a row for each of AGES too: after_16_sleeps/age_1_2 and so on. lives are
    those of a split (`lab.tasks.life.Lives`); `lab.tasks.life_examples` says what the cases are.
    on_done(done, total) counts questions of a row.
    """
    from .tasks.life_examples import examples

    chat = _Chat(model, tokenizer)
    for case in cases:
        items = list(examples(lives, case, n))
        for N in passes:
            asked: list[tuple[int, bool, bool]] = []  # age, right, right with S zeroed
            for group in _groups(items, lambda e: len(e.windows), batch):
                state = model.init_state(len(group))
                for w in range(len(group[0].windows)):
                    state = chat.sleep(state, [e.windows[w] for e in group], N)
                kept, zeroed = (
                    chat.answers(start, [e.prompt for e in group])
                    for start in (state, zero_fast_weights(state))
                )
                asked += [
                    (e.age, _holds(a, e.value), _holds(b, e.value))
                    for e, a, b in zip(group, kept, zeroed, strict=True)
                ]
                on_done(len(asked), len(items))
            yield _row_of(case, N, asked)
            for low, high in AGES if case == "after_16_sleeps" else ():
                of_age = [each for each in asked if low <= each[0] <= high]
                if of_age:
                    yield _row_of(f"{case}/age_{low}_{high}", N, of_age)


def evaluate_natural(
    model,
    tokenizer,
    *,
    passes: Iterable[int],
    batch: int = 24,
    limit: int | None = None,
    on_done: OnDone = lambda done, total: None,
) -> Iterator[dict]:
    """Rows like those of `evaluate_lives`: `natural`, and natural/CASE for each of its cases.

    The messages of a window are said one by one and answered by the model; then it sleeps. limit:
    only so many conversations.
    """
    chat, conversations = _Chat(model, tokenizer), natural.load()[:limit]
    total = sum(len(c.questions) for c in conversations)
    for N in passes:
        right: dict[str, int] = {}
        zeroed: dict[str, int] = {}
        count: dict[str, int] = {}
        for group in _groups(conversations, lambda c: len(c.windows), batch):
            state = model.init_state(len(group))
            for w in range(len(group[0].windows)):
                heard = chat.converse(state, [c.windows[w] for c in group], first=w == 0)
                state = chat.sleep(state, heard, N)
            asked = [(row, q) for row, c in enumerate(group) for q in c.questions]
            for start in range(0, len(asked), batch):
                part = asked[start : start + batch]
                rows = mx.array([row for row, _ in part])
                of = [{n: x[rows] for n, x in layer.items()} for layer in state]
                prompts = [tokenizer.turn(q.ask, first=False) for _, q in part]
                for found, given in ((right, of), (zeroed, zero_fast_weights(of))):
                    for (_, q), reply in zip(part, chat.answers(given, prompts), strict=True):
                        hit = natural.correct(reply, q)
                        for name in ("natural", f"natural/{q.case}"):
                            found[name] = found.get(name, 0) + hit
                            count[name] = count.get(name, 0) + (found is right)
                on_done(count["natural"], total)
        for name in sorted(count):
            yield _row(name, N, right[name], zeroed[name], count[name])


def evaluate_base(
    model,
    tokenizer,
    lives,
    *,
    n: int | None = None,
    batch: int = 20,
    on_done: OnDone = lambda done, total: None,
) -> list[dict]:
    """Rows of memory ("base", "empty", "full"), agreement, perplexity, tokens.

    The base answers ordinary prompts greedily; agreement is the share of its tokens that the
    model finds likeliest too, teacher-forced, and perplexity is that of these replies. full: after
    16 sleeps over a life's windows. n: only so many prompts.
    """
    from .tasks.life_examples import examples

    chat, prompts = _Chat(model, tokenizer), natural.ordinary()[:n]
    (life,) = examples(lives, "after_16_sleeps", 1)
    full = model.init_state()
    for window in life.windows:
        full = chat.sleep(full, [window], model.sleep.passes)
    same = {"base": 0.0, "empty": 0.0, "full": 0.0}
    loss, tokens = dict.fromkeys(same, 0.0), 0
    for start in range(0, len(prompts), batch):
        asked = [tokenizer.turn(text, first=True) for text in prompts[start : start + batch]]
        with left_out(model):
            theirs = _greedy(model.host, asked, tokenizer.stop_ids, REPLY_TOKENS)
        rows = [prompt + reply for prompt, reply in zip(asked, theirs, strict=True)]
        x, mask = pad(rows)
        marks = np.zeros(x.shape, bool)  # outputs that predict a token of the reply
        for i, (prompt, row) in enumerate(zip(asked, rows, strict=True)):
            marks[i, len(prompt) - 1 : len(row) - 1] = True
        at = mx.array(np.flatnonzero(marks))
        targets = mx.array(np.array(x).reshape(-1)[np.flatnonzero(marks) + 1])
        wide = [{k: mx.repeat(s, len(rows), axis=0) for k, s in layer.items()} for layer in full]
        for name, state in (("base", None), ("empty", model.init_state(len(rows))), ("full", wide)):
            if state is None:
                with left_out(model):
                    h, _ = model.host.hidden(x)
            else:
                h, _ = model.hidden(x, state, mask)
            logits = model.head(h.reshape(-1, h.shape[-1])[at]).astype(mx.float32)
            log_p = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
            log_p = log_p - mx.logsumexp(logits, axis=1)
            same[name] += np.array(mx.argmax(logits, axis=1) == targets).sum()
            loss[name] -= np.array(log_p).sum()
        tokens += targets.size
        on_done(min(start + batch, len(prompts)), len(prompts))
    return [
        {
            "memory": name,
            "agreement": same[name] / tokens,
            "perplexity": math.exp(loss[name] / tokens),
            "tokens": tokens,
        }
        for name in same
    ]


class _Chat:
    """Several conversations at once with one model, in a session's tokens."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer

    def sleep(self, state: State, windows: list[list[int]], passes: int) -> State:
        """The state after a sleep over each row's window; a window may be empty."""
        tokens, mask = pad(windows)
        said = [self.tokenizer.in_replies(ids) for ids in windows]
        said = [row + [True] * (tokens.shape[1] - len(row)) for row in said]
        write = self._fold(mx.array(said)).get("write")
        return consolidate(self.model, state, tokens, passes, mask=mask, write=write)[0]

    def answers(self, state: State, prompts: list[list[int]]) -> list[str]:
        """The greedy reply to each prompt, each from its row of the state."""
        h, state = self._read(state, prompts)
        ids, _ = self._reply(h, state, [True] * len(prompts), ANSWER_TOKENS)
        return [self.tokenizer.decode(row) for row in ids]

    def converse(
        self, state: State, messages: Sequence[Sequence[str]], first: bool
    ) -> list[list[int]]:
        """The ids of one window: each row's messages, and a greedy reply to each."""
        heard: list[list[int]] = [[] for _ in messages]
        for turn in range(max(map(len, messages))):
            opens = first and turn == 0
            said = [
                self.tokenizer.turn(row[turn], first=opens) if turn < len(row) else []
                for row in messages
            ]
            h, state = self._read(state, said)
            replies, state = self._reply(h, state, [bool(ids) for ids in said], REPLY_TOKENS)
            ends = [self.tokenizer.end_ids if ids else [] for ids in said]
            _, state = self._read(state, ends, ends=True)
            for row, ids, reply, end in zip(heard, said, replies, ends, strict=True):
                row += [*ids, *reply, *end]
        return heard

    def _read(self, state: State, rows: list[list[int]], ends: bool = False):
        """(h [B, 1, hidden] after each row's last token, state); ends: these are ends of replies,
        of which the first token is the model's own."""
        tokens, mask = pad(rows)
        said = mx.zeros(tokens.shape, mx.bool_)
        said = said | (mx.arange(tokens.shape[1]) == 0) if ends else said
        h, state = self.model.hidden(tokens, state, mask, **self._fold(said))
        last = mx.maximum(mask.sum(axis=1) - 1, 0)
        h = mx.take_along_axis(h, last[:, None, None], axis=1)
        mx.eval(h, state)
        return h, state

    def _reply(self, h, state: State, active: list[bool], limit: int):
        """(greedy ids of each active row without its stop, state after them)."""
        going = np.array(active)
        replies: list[list[int]] = [[] for _ in active]
        for _ in range(limit):
            logits = self.model.head(h)[:, 0, : len(self.tokenizer)]
            token = mx.argmax(logits, axis=-1)
            for row, chosen in enumerate(np.array(token).tolist()):
                going[row] &= chosen not in self.tokenizer.stop_ids
                if going[row]:
                    replies[row].append(chosen)
            if not going.any():
                break
            mask = mx.array(going)[:, None]
            fold = self._fold(mx.ones(mask.shape, mx.bool_))
            h, state = self.model.hidden(token[:, None], state, mask, **fold)
            mx.eval(h, state)
        return replies, state

    def _fold(self, said) -> dict[str, mx.array]:
        return {"write": ~said} if self.model.sleep.fold == "user" else {}


def _greedy(model, prompts: list[list[int]], stops, limit: int) -> list[list[int]]:
    """Greedy replies of a model without memory; each has one token at least, a stop included."""
    from ..training.ordinary import generate

    replies = generate(model, prompts, limit, stops)
    stop = next(iter(stops))
    return [ids if ids else [stop] for ids, _ in replies]


def _holds(reply: str, value: str | None) -> bool:
    answers = None if value is None else (value,)
    return natural.correct(reply, natural.Question("", answers, "recall"))


def _row_of(case: str, passes: int, asked: Sequence[tuple[int, bool, bool]]) -> dict:
    right, zeroed = (sum(each[i] for each in asked) for i in (1, 2))
    return _row(case, passes, right, zeroed, len(asked))


def _row(case: str, passes: int, right: int, zeroed: int, n: int) -> dict:
    low, high = wilson(right, n)
    return {
        "case": case,
        "passes": passes,
        "accuracy": right / n,
        "low": low,
        "high": high,
        "n": n,
        "zeroed": zeroed / n,
    }


def _groups(items: list, kind: Callable, batch: int) -> Iterator[list]:
    """At most `batch` items at a time, alike in `kind`."""
    for _, group in groupby(sorted(items, key=kind), kind):
        alike = list(group)
        yield from (alike[i : i + batch] for i in range(0, len(alike), batch))
