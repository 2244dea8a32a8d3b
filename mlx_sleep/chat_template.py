"""Turns of a chat as token ids: a thin layer over mlx-lm's TokenizerWrapper.

A session feeds a conversation turn by turn and never again from its start, so this module
takes the chat template apart once, into what stands around a user's text. A turn's ids are those
that the whole conversation has there, rendered and tokenized at once, but that no text a user
types becomes a control token. It knows no model and no state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm import tokenizer_utils
from transformers.utils import logging

from .template_parts import TEXTS, Apply, Template, has_switch, switch, system_opening, take_apart
from .templates import bounded
from .thoughts import Marks, Thinking, ThoughtReader
from .tokenizer_config import TOKENIZERS, check_files, why
from .tokens import Detokenizer, Pieces, Tokens, joined
from .utils.errors import UserError, is_failure


class Parts(NamedTuple):
    """Ids around the texts of a chat: first + text + between opens one, before + text + between
    goes on, and end ends a reply."""

    first: list[int]
    before: list[int]
    between: list[int]
    end: list[int]


class ChatTokenizer:
    """Encodes user turns and decodes replies.

    `stop_ids` end a reply when the model samples one; `end_ids` close it in the context.
    Everything else (encode, decode, ...) is that of the wrapped tokenizer.

    thinking  "on" or "off" by the template's own switch, or "auto", as the template has it.
              UserError where it has no switch
    trained   what it was when the model was trained to sleep, where the template has a switch.
              "auto" means it; and "off" has the mark that there is no thought in the past too, as
              the training had
    """

    def __init__(
        self,
        tokenizer: tokenizer_utils.TokenizerWrapper,
        thinking: Thinking = "auto",
        trained: Thinking = "auto",
    ):
        self._given, self.thinking = tokenizer, thinking
        self._tokenizer = tokenizer = bounded(tokenizer)
        # Added tokens count; a gap among the ids would too. (mlx-lm before 0.32 has no len().)
        self._size = max(tokenizer.get_vocab().values()) + 1
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("this kind of tokenizer is not supported; it needs a tokenizer.json")
        self._tokens = Tokens(backend)
        self._marks = _marks_of(tokenizer, backend)
        self.trained = trained if trained == "auto" or has_switch(tokenizer) else "auto"
        meant = self.trained if thinking == "auto" else thinking
        self._keeps_marks = meant == self.trained == "off"
        self._apply = apply = Apply(tokenizer, switch(tokenizer, meant, self._marks is not None))
        self._template = take_apart(apply, self._tokens)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        bos = tokenizer.encode("")[:1]
        self._bos = bos if bos == [tokenizer.bos_token_id] else []
        self.end_ids: list[int] = eos
        self.stop_ids: frozenset[int] = frozenset(tokenizer.eos_token_ids)
        self._ids = Parts([], [], [], eos)
        self._before_reply: list[int] = []
        self._mark: list[int] = []  # that there is no thought, where the past has it
        if (chat := self._template) is None:
            return
        ids = self._tokens.ids
        self.end_ids = ids(chat.end, after="text")
        self.stop_ids |= chat.mark
        self._ids = Parts(
            ids(chat.first), ids(chat.before, "token"), ids(chat.prompt, "text"), self.end_ids
        )
        # What a reply stands after, in the past too.
        self._before_reply, past = self._ids.between, ids(chat.past, "text")
        if self._past_differs and self._before_reply[: len(past)] == past:
            self._before_reply = past
            self._mark = self._ids.between[len(past) :] if self._keeps_marks else []
        if self.turn(TEXTS[0], first=True) != apply(TEXTS[:1]):
            raise UserError("this model's tokenizer does not encode a chat piece by piece")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def with_thinking(self, thinking: Thinking) -> ChatTokenizer:
        """The same, with another `thinking`."""
        return ChatTokenizer(self._given, thinking, self.trained)

    def to_train_with(self) -> ChatTokenizer:
        """The same for the training of sleep: thinking is off, where the template has a switch.
        `trained` says what it is, and is to be kept with the model."""
        return ChatTokenizer(self._given, trained="off")

    def __len__(self) -> int:
        return self._size

    @property
    def largest_id(self) -> int:
        """The largest id that a turn, a reply's end or a text can have."""
        return max([self._tokens.largest_id, *self._bos, *(i for part in self._ids for i in part)])

    @functools.cached_property
    def _system(self) -> tuple[Pieces, Pieces]:
        return system_opening(self._apply, self._tokens)

    def opening(self, system: str | None) -> list[int]:
        """The ids before the user's first text. UserError where `system`, a system prompt, has no
        place in the template."""
        if (chat := self._template) is None and system is None:
            return self._bos
        return self._tokens.ids(self._first(chat, system))

    def _first(self, chat: Template | None, system: str | None) -> Pieces:
        if system is None:
            assert chat is not None
            return chat.first
        before, after = self._system
        return joined(before, [system], after)

    def turn(self, text: str, first: bool, system: str | None = None) -> list[int]:
        """A user's turn and the prompt for a reply, to be appended to the conversation so far.

        first   no token came before, so the template's opening (BOS, system prompt) is included
        system  the system prompt of that opening; None is the template's own, if it has one

        A base model without a chat template gets its text as it is.
        """
        if (chat := self._template) is None:
            return [*(self._bos if first else ()), *self.encode_text(text)]
        if first:
            return self._tokens.ids(joined(self._first(chat, system), [text], chat.prompt))
        # The end of a reply is cut off where a token ends, so what follows is encoded by itself.
        pieces = joined(chat.end, chat.before, [text], chat.after_later)
        return self._tokens.ids(pieces, after="text")[len(self.end_ids) :]

    def past_turn(self, text: str, first: bool, system: str | None = None) -> list[int]:
        """`turn` as the template has it once the reply is in the past: without a thought that the
        prompt opens, or the mark that there is none; up to the reply's text."""
        chat = self._template
        if chat is None or self._keeps_marks or not self._past_differs:
            return self.turn(text, first, system)
        if first:
            return self._tokens.ids(joined(self._first(chat, system), [text], chat.past))
        pieces = joined(chat.end, chat.before, [text], chat.past)
        return self._tokens.ids(pieces, after="text")[len(self.end_ids) :]

    @property
    def _past_differs(self) -> bool:
        """Whether the past says something else of thoughts than a prompt does."""
        if (chat := self._template) is None or self._marks is None:
            return False
        known = {*self._marks.start, *self._marks.end}
        sides = [[p for p in pieces if p in known] for pieces in (chat.prompt, chat.past)]
        return sides[0] != sides[1]

    def thought_reader(self) -> ThoughtReader:
        """A new one, for the ids of a reply after a turn's prompt."""
        opened = False
        if self._template is not None and self._marks is not None:
            prompt = self._tokens.ids(self._template.prompt, after="text")
            opened = _last(prompt, self._marks.start) > _last(prompt, self._marks.end)
        return ThoughtReader(self._marks, opened, self._decode, self.encode_text)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    @property
    def parts(self) -> Parts:
        """The template's ids. UserError where there is none, where it has no turns alike from the
        second one on, or a text's ids depend on what stands around it."""
        if self._template is None:
            raise UserError(
                "the model has no chat template; take one that was tuned for chat, or put its "
                "chat_template.jinja into the model's folder"
            )
        first, before, between, _ = self._ids
        for text in (TEXTS[0], "(3 words, 眠り)"):
            middle = self.encode_text(text) + between
            alike = [first + middle, before + middle] == [self.turn(text, f) for f in (True, False)]
            if not before or not between or not alike:
                raise UserError("the model's chat template has no turns that look alike")
        return self._ids

    def in_replies(self, ids: list[int]) -> list[bool]:
        """Which tokens of a conversation the model said, each reply's end mark included.

        ids may begin anywhere; what is before the first user's turn is taken for a reply. What a
        user types can't look like a turn of the template, so the ids alone tell. Without a
        template nothing is a reply.
        """
        first, start, _, _ = self._ids
        prompt, mark = self._before_reply, self._mark
        whole = prompt + mark
        said, talks = [], bool(prompt)
        for i in range(len(ids)):
            if not i and first and ids[: len(first)] == first:
                talks = False
            if start and ids[i : i + len(start)] == start:
                talks = False
            said.append(talks)
            if talks and self.end_ids and ids[i] == self.end_ids[0]:
                talks = False
            elif not talks and prompt and ids[i + 1 - len(prompt) : i + 1] == prompt:
                talks = True
            if mark and ids[i + 1 - len(whole) : i + 1] == whole:
                said[-len(mark) :] = [False] * len(mark)
        return said

    @property
    def detokenizer(self) -> Detokenizer:
        """A new one, for the text of a reply token by token."""
        return Detokenizer(self._tokenizer)

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text by itself: control tokens spelled out in it are text like any other."""
        return self._tokens.ids([text])


def load(
    path: str | Path,
    eos_token_ids: Iterable[int] | None = None,
    *,
    thinking: Thinking = "auto",
    trained: Thinking = "auto",
) -> ChatTokenizer:
    """The tokenizer in a model folder. UserError when there is none or it cannot be read.

    Python files beside it are not run. A tokenizer that needs them cannot be read.
    """
    if not any((Path(path) / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{path} has no tokenizer: it needs one of {', '.join(TOKENIZERS)}")
    check_files(Path(path))
    ids = None if eos_token_ids is None else list(eos_token_ids)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every model_type that transformers doesn't have
    try:
        # Neither run nor asked about: without the word, transformers asks on standard input.
        trust = {"trust_remote_code": False}
        loaded = tokenizer_utils.load(Path(path), trust, eos_token_ids=ids)
        return ChatTokenizer(loaded, thinking, trained)
    except UserError:
        raise
    except BaseException as error:  # the tokenizers library raises plain Exceptions, or panics
        if not is_failure(error):
            raise
        reason = why(Path(path), error)
        raise UserError(f"the tokenizer in {path} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _marks_of(tokenizer: tokenizer_utils.TokenizerWrapper, backend: Any) -> Marks | None:
    """The marks of a thought, as mlx-lm finds them in the vocabulary."""
    if not tokenizer.has_thinking:
        return None
    ids = (
        tuple(backend.encode(mark, add_special_tokens=False).ids)
        for mark in (tokenizer.think_start, tokenizer.think_end)
    )
    return Marks(*ids)


def _last(ids: list[int], mark: tuple[int, ...]) -> int:
    """Where the mark stands last; -1 for nowhere."""
    starts = range(len(ids) - len(mark) + 1)
    return max((i for i in starts if tuple(ids[i : i + len(mark)]) == mark), default=-1)
