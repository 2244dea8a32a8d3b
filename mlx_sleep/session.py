"""One conversation with a model that sleeps: it takes turns, streams replies, and sleeps.

It brings together a window (`window.py`), which is in the model and in the memory, the turns of a
user (`turns.py`), and a reply in progress (`reply.py`). It knows no terminal and starts no thread.
Only one thread may call it at a time (every array it keeps is evaluated, so that it need not always
be the same one).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat_template import ChatTokenizer
from .memory import Contents, Memory
from .models.base import SleepModel, State, fast_weight_bytes, kv_bytes
from .models.calibrate import calibrate
from .models.checkpoint import Checkpoint
from .opening import open_parts
from .reply import Reply
from .sampling import Sampling
from .sleep import SleepReport
from .stats import Stats
from .thoughts import Thinking, Thought
from .turns import Turn, Turns, checked
from .utils.errors import UserError
from .window import OnPass, OnRead, ShouldStop, Watch, Window


class Session:
    """A chat with `model`, remembered in `memory` (or not at all, when that is None).

        with Session.open(memory="alice") as session:
            session.tell("My cat is called Zorvi.")
            session.sleep()
            print(session.ask("What is my cat called?"))

    passes, window  N and L; None takes the model's own
    max_tokens      longest reply, in tokens; thoughts before it may fill one window more
    temp, top_p, top_k, min_p, repetition_penalty
                    sampling, by mlx-lm's names (`Sampling`): temp 0, the default, is greedy
    seed            of the sampling; None leaves MLX's random state alone
    system_prompt   see the property; None takes the memory's, "" takes it away
    keep_thoughts   leave thoughts in the window, which a sleep folds in
    on_sleep        called with the SleepReport of every sleep, those of a full window included
    transcript      whether the memory keeps what is said as text, too

    `sampling` and `thinking` may be set to others between turns, and `sampler` to any of mlx-lm's:
    log-probabilities [1, V] -> token ids [1]. It is called one token ahead of the reply.
    `cut` says whether the last reply ended because it had max_tokens tokens.

    It sleeps by itself when a turn would not fit in the window, and on `close`. A memory with
    tokens that no sleep has folded in yet is replayed through the model. Errors are UserErrors;
    whatever raises leaves the states and the memory consistent.

    A model without fast weights (`can_sleep` is False) talks until its window is full, and then
    says so; its memory is the text of the window.
    """

    def __init__(
        self,
        model: SleepModel,
        tokenizer: ChatTokenizer | TokenizerWrapper,
        memory: Memory | None = None,
        *,
        passes: int | None = None,
        window: int | None = None,
        max_tokens: int = 256,
        temp: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        keep_thoughts: bool = False,
        system_prompt: str | None = None,
        on_sleep: Callable[[SleepReport], None] | None = None,
        transcript: bool = True,
    ):
        self.model, self.memory = model, memory
        self.tokenizer = (
            tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(tokenizer)
        )
        self.max_tokens, self.on_sleep, self.transcript = max_tokens, on_sleep, transcript
        self.keep_thoughts = keep_thoughts
        self.sampler: Callable[[mx.array], mx.array]
        self.sampling = Sampling(temp, top_p, top_k, min_p, repetition_penalty)
        if seed is not None:
            self.seed(seed)
        # Loaded weights are lazy, and a lazy array can only be evaluated by its own thread.
        mx.eval(model.parameters())
        calibrate(model)
        self._window = Window(
            model,
            self.tokenizer,
            memory,
            size=model.sleep.window if window is None else window,
            passes=model.sleep.passes if passes is None else passes,
            transcript=transcript,
            on_sleep=self._slept,
        )
        self._load()
        self._turns = Turns(self._window, keep_thoughts, system_prompt)

    def _load(self) -> None:
        """Takes all from the memory, and ends a reply in which a process was killed."""
        self._window.load()
        self._reply = Reply.last(self._window)
        self._reply.end()
        self._window.read()

    @classmethod
    def open(
        cls,
        model: str | Path | Checkpoint | None = None,
        memory: str | None = None,
        *,
        adapter: str | Path | None = None,
        home: str | os.PathLike | None = None,
        thinking: Thinking = "auto",
        **options: Any,
    ) -> Session:
        """Loads a model and opens a memory by name.

        model is a folder of ours or of mlx-lm's, or what `mlx_sleep.open_model` makes of any other
        and of an id on Hugging Face; None is the embedded model. adapter is the folder of an
        adapter for it; home is the folder of the memories; thinking is that of `ChatTokenizer`;
        options are those of `Session`; sampling that they don't give (or give as None) is as the
        folder's generation_config.json has it.
        UserError when a folder or the memory cannot be used.
        """
        opened = open_parts(model, memory, adapter, home, thinking)
        for name, value in asdict(opened.sampling).items():
            if options.get(name) is None:
                options[name] = value
        try:
            return cls(opened.model, opened.tokenizer, opened.memory, **options)
        except BaseException:
            if opened.memory is not None:
                opened.memory.close()
            raise

    # --- talking ---------------------------------------------------------------------------

    def say(
        self,
        text: str,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
        on_read: OnRead | None = None,
    ) -> Generator[str]:
        """Takes a user's turn and streams the reply, in pieces of text as they are generated.

        What the model thinks before its reply comes as `Thought`, a str. It is read, and left out
        of the window when the reply ends, as templates leave it out of the past.

        The turn is in the memory and on the disk when this returns; the reply, when it ends.
        A reply that is not read to its end (close the iterator to stop it) ends there, and stays
        in the window like any other. UserError for a text that is empty, too long or not valid
        Unicode.

        on_pass and should_stop are those of `sleep`, for a window that fills up on the way.
        SleepCancelled here means that the turn was not taken; from the reply, that it ends there.
        on_read(done, total) is called while the turn is read, with tokens; what it raises ends the
        reply.
        """
        watch = Watch(on_pass, should_stop, on_read)
        turn = self._take(text, None, watch)
        return self._reply.decode(turn, self.sampler, self._processors, self.max_tokens, watch)

    def hear(
        self,
        text: str,
        reply: str,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
    ) -> None:
        """Takes a user's turn with its reply, said in some other place. "" is a reply cut at once.

        Both are in the memory and on the disk when this returns, and read through the model.
        Errors are those of `say`; SleepCancelled may leave the turn to be read by the next call.
        """
        watch = Watch(on_pass, should_stop)
        self._take(text, reply.strip(), watch)
        self._window.read(watch)

    def ask(self, text: str) -> str:
        """`say`, with the whole reply at once, and without thoughts."""
        return "".join(piece for piece in self.say(text) if not isinstance(piece, Thought))

    tell = ask

    def _take(self, text: str, reply: str | None, watch: Watch) -> Turn:
        """Puts a turn into the window and the memory. One that can't be written was not heard."""
        text = checked(text)
        self._reply.end()
        turn = self._turns.take(text, reply, watch)
        if reply is None:
            self._reply = Reply(self._window, keep_thoughts=self.keep_thoughts)
        try:
            self._window.sync()
        except UserError:
            self._reply.drop()
            self._window.take_back(len(turn.past + turn.reply))
            raise
        return turn

    # --- settings --------------------------------------------------------------------------

    @property
    def system_prompt(self) -> str | None:
        """What each window begins with, in the place that the chat template has for it.

        The memory keeps it. None is the template's own, or none, at the start of all and not again.
        A window that begins within a reply has it before its next turn. What is set holds from the
        next window on: at once if nothing is in this one, else after a sleep, and
        `system_prompt_waits` is True until then. UserError where the template has no place for it,
        or it takes more than half the window.
        """
        return self._turns.system_prompt

    @system_prompt.setter
    def system_prompt(self, text: str | None) -> None:
        self._turns.system_prompt = text

    @property
    def system_prompt_waits(self) -> bool:
        """Whether the system prompt is newer than the window."""
        return self._turns.system_prompt_waits

    @property
    def thinking(self) -> Thinking:
        """Whether the model thinks before a reply, from the next one on when it is set. UserError
        where the chat template has no switch."""
        return self.tokenizer.thinking

    @thinking.setter
    def thinking(self, thinking: Thinking) -> None:
        changed = self.tokenizer.with_thinking(thinking)
        self._reply.end()
        self.tokenizer = self._window.tokenizer = changed

    @property
    def sampling(self) -> Sampling:
        """How replies are sampled, from the next one on when it is set."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.sampler = sampling.sampler(len(self.tokenizer))
        self._processors = sampling.processors()

    def seed(self, seed: int) -> None:
        """Seeds the sampling, which is MLX's random state. UserError for a seed out of range."""
        if not 0 <= seed < 2**64:
            raise UserError(f"the seed must be at least 0 and below 2**64, not {seed}")
        mx.random.seed(seed)

    @property
    def max_tokens(self) -> int:
        """The longest reply, in tokens."""
        return self._max_tokens

    @max_tokens.setter
    def max_tokens(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise UserError(f"max tokens must be at least 1, not {max_tokens}")
        self._max_tokens = max_tokens

    @property
    def passes(self) -> int:
        """N of the next sleep."""
        return self._window.passes

    @passes.setter
    def passes(self, passes: int) -> None:
        self._window.passes = passes

    # --- sleeping --------------------------------------------------------------------------

    def sleep(
        self, on_pass: OnPass | None = None, should_stop: ShouldStop | None = None
    ) -> SleepReport | None:
        """Folds the window into the fast weights, N passes: a report, or None if it is empty.

        on_pass(done, passes, moved) is called after every pass, should_stop() after every block.
        A transaction: when it raises (SleepCancelled; UserError for non-finite fast weights or
        a disk that can't be written) the states and the memory are as they were. When the window
        overflows, each full window is a transaction of its own.
        """
        self._reply.end()
        report = self._window.sleep(Watch(on_pass, should_stop))
        # Nobody waits for a reply: the time to judge what it met (on a GPU).
        calibrate(self.model, should_stop)
        return report

    def _slept(self, report: SleepReport) -> None:
        if self.on_sleep:
            self.on_sleep(report)

    # --- the window ------------------------------------------------------------------------

    @property
    def window(self) -> int:
        """L: tokens that the window can hold."""
        return self._window.size

    @property
    def can_sleep(self) -> bool:
        """Whether the model has fast weights."""
        return self._window.can_sleep

    @property
    def pending(self) -> tuple[int, ...]:
        """Ids of the tokens that no sleep has folded in yet."""
        return tuple(self._window.tokens)

    @property
    def snapshot(self) -> State:
        """The state at the start of the window, which the next sleep starts from."""
        return self._window.snapshot

    @property
    def state(self) -> State:
        """The working state. Its KV cache is copied while anybody holds it: don't keep it."""
        return self._window.working.state

    @property
    def cut(self) -> bool:
        """Whether the last reply ended because it had max_tokens tokens."""
        return self._reply.cut

    def stats(self) -> Stats:
        return Stats(
            window_tokens=len(self._window.tokens),
            window=self.window,
            passes=self.passes,
            kv_bytes=kv_bytes(self.state),
            fast_weight_bytes=fast_weight_bytes(self.state),
            tokens=self._window.folded,
            sleeps=self._window.sleeps,
            prompt_tps=self._reply.prompt_tps,
            generation_tps=self._reply.generation_tps,
        )

    # --- the end ---------------------------------------------------------------------------

    def undo(self) -> Literal["turn", "sleep"] | None:
        """Takes back the last turn with its reply, or the last sleep when nothing was said since.

        Returns what it was; None when there is nothing to take back (`Memory.undo`).
        """
        if self.memory is None:
            return None
        self._reply.end()
        what = self.memory.undo()
        if what:
            self._load()
        return what

    def replace(self, contents: Contents) -> None:
        """Puts other contents in place of all that the memory holds, and goes on from there."""
        if self.memory is None:
            raise ValueError("a session without a memory has nothing to replace")
        self._reply.end()
        self.memory.replace(contents)
        self._load()

    def forget(self) -> None:
        """Empties the memory, on the disk too, and starts from nothing."""
        if self.memory is not None:
            self.memory.forget()
        self._reply.drop()
        self._window.clear()

    def close(
        self,
        sleep: bool = True,
        on_pass: OnPass | None = None,
        should_stop: ShouldStop | None = None,
    ) -> SleepReport | None:
        """Sleeps (unless told not to) and lets go of the memory.

        The memory is closed even when the sleep raises; it then keeps the window. A second close
        does nothing.
        """
        if self.memory is not None and self.memory.closed:
            return None
        try:
            self._reply.end()
            return self.sleep(on_pass, should_stop) if sleep and self.can_sleep else None
        finally:
            if self.memory is not None:
                self.memory.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(sleep=kind is None)
