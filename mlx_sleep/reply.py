"""A reply in progress: it samples tokens, tells thoughts from text, stops, and ends legally.

What the model thinks before its reply is read and left out of the window, as templates leave it
out of the past: the working state steps aside to think, and comes back to read the text again. With
keep_thoughts all goes into the window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from functools import partial
from typing import cast

import mlx.core as mx

from .sampling import REPETITION_CONTEXT
from .thoughts import Split, Stream
from .turns import Turn
from .window import UNWATCHED, Watch, Window

Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]


class Reply:
    """A reply to the last turn of a window. It is open until `end` or `drop`.

    said            ids of its text so far
    cut             whether it ended because it had max_tokens tokens
    prompt_tps      tokens a second at which the turn was read; None before the first token
    generation_tps  ... at which the reply came after its first token; None for less than two
    """

    def __init__(self, window: Window, said: Iterable[int] = (), *, keep_thoughts: bool = False):
        self._window, self._keep_thoughts = window, keep_thoughts
        self.said = list(said)
        self.open, self.cut = True, False
        self.prompt_tps: float | None = None
        self.generation_tps: float | None = None

    @classmethod
    def last(cls, window: Window) -> Reply:
        """The reply with which a window ends; it is open where a process was killed in it."""
        tokens, end = window.tokens, window.tokenizer.end_ids
        if not tokens or tokens[-len(end) :] == end:
            reply = cls(window)
            reply.drop()
            return reply
        said = window.tokenizer.in_replies(tokens)
        return cls(window, tokens[len(said) - said[::-1].index(False) if False in said else 0 :])

    def decode(
        self,
        turn: Turn,
        sampler: Sampler,
        processors: list[Processor],
        max_tokens: int,
        watch: Watch = UNWATCHED,
    ) -> Generator[str]:
        """Streams it in pieces of text, one forward pass a token, one token ahead; then ends it.

        sampler     log-probabilities [1, V] -> token ids [1]
        processors  those of `Sampling`
        max_tokens  of text; thoughts may fill one window more
        """
        window = self._window
        working, tokenizer = window.working, window.tokenizer
        sample = partial(self._sample, sampler, processors)
        reader, stream = tokenizer.thought_reader(), Stream(lambda: tokenizer.detokenizer)
        left, thoughts = max_tokens, window.size
        unread, start = len(window.tokens) - working.read, time.perf_counter()
        first, made = start, 0
        try:
            if not self._keep_thoughts and tokenizer.has_thinking:
                self._step_aside(turn, watch)
            window.read(watch)
            token = sample()
            while not self.cut:
                done = reader.in_text and left == 1
                following = None if done else window.run_ahead(token, partial(sample, token))
                taken = cast(int, token.item())
                now = time.perf_counter()
                if not made:
                    first, self.prompt_tps = now, unread / (now - start)
                else:
                    self.generation_tps = made / (now - first)
                made += 1
                if taken in tokenizer.stop_ids or not window.has_room(1):
                    break
                split = reader.add(taken)
                self._keep(taken, split)
                left -= len(split.text)
                thoughts -= not split.text
                self.cut = left <= 0 or thoughts <= 0
                yield from stream.add(split)
                if not self.open:  # another turn or a sleep came in between
                    return
                if following is not None:
                    working.take()
                    token = following
                elif not self.cut:  # the window is full
                    window.read(watch._replace(on_read=None))
                    token = sample()
            split = reader.finish()
            if not self._keep_thoughts:
                self._keep_text(split.text)
            yield from stream.add(split)
            yield from stream.end()
        finally:
            self.end()

    def end(self) -> None:
        """Closes it, however it came to its end, so that the window stays legal. The window is on
        the disk then. Nothing happens to one that has ended."""
        if not self.open:
            return
        window = self._window
        with window.rewinding():
            window.working.settle()
        window.step_back()
        window.append(window.tokenizer.end_ids, "assistant", self._text())
        self.open = False
        window.sync()

    def drop(self) -> None:
        """It has no end: what it was a reply to is gone."""
        self.open = False

    def _text(self) -> str:
        detokenizer = self._window.tokenizer.detokenizer
        for token in self.said:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text.strip()

    def _sample(
        self,
        sampler: Sampler,
        processors: list[Processor],
        ahead: mx.array | None = None,
        logits: mx.array | None = None,
    ) -> mx.array:
        """The token [1] after the window's and `ahead` [1], from logits [V]; not evaluated."""
        logits = self._window.working.logits if logits is None else logits
        assert logits is not None  # a turn has been read
        logits = logits[None]
        if processors:
            so_far = mx.array(self._window.seen()[-REPETITION_CONTEXT:])
            so_far = so_far if ahead is None else mx.concatenate([so_far, ahead])
            for process in processors:
                logits = process(so_far, logits)
        return sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    # --- thoughts --------------------------------------------------------------------------

    def _step_aside(self, turn: Turn, watch: Watch) -> None:
        """Where the model is asked in other words than the past has: from there on it reads those,
        and what it thinks."""
        same = 0
        while turn.past[same : same + 1] == turn.asked[same : same + 1] != []:
            same += 1
        self._window.step_aside(len(turn.past) - same, turn.asked[same:], watch)

    def _keep(self, token: int, split: Split) -> None:
        """Appends what is known to be the reply's text after this token of it."""
        if self._keep_thoughts:
            self._window.append([token])
            self.said += split.text
            return
        if (aside := self._window.aside) is not None:
            aside.ids.append(token)
        self._keep_text(split.text)

    def _keep_text(self, text: list[int]) -> None:
        """Appends the reply's text, which the working state has read."""
        self._window.append(text)
        self.said += text
        if text and (aside := self._window.aside) is not None:
            if aside.ids[-len(text) :] == text:
                del aside.ids[-len(text) :]
            else:  # a token with a line break that is none of the text
                aside.end += len(text)
