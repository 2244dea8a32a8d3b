"""Turns of a chat as token ids: a thin layer over mlx-lm's TokenizerWrapper.

A session feeds a conversation turn by turn and never again from its start, so this module
takes the chat template apart once, into the strings around a user's text, and encodes the text
by itself. What a user types can so never become a control token. It knows no model and no state.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_lm import tokenizer_utils
from transformers.utils import logging

from .utils.errors import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

# Stand-ins for the texts of a conversation; no template contains or alters such words.
_USER, _REPLY, _NEXT = "USERxTEXTx1", "REPLYxTEXTx1", "USERxTEXTx2"


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
    Everything else (encode, decode, detokenizer, ...) is that of the wrapped tokenizer.
    """

    def __init__(self, tokenizer: tokenizer_utils.TokenizerWrapper):
        self._tokenizer = tokenizer
        # Added tokens count; a gap among the ids would too. (mlx-lm before 0.32 has no len().)
        self._size = max(tokenizer.get_vocab().values()) + 1
        first, later, end = _take_template_apart(tokenizer)
        self._first = [self._encode_template(part) for part in first]
        self._later = [self._encode_template(part) for part in later]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.end_ids: list[int] = self._encode_template(end) or eos
        # A template's end mark stops a reply too, unless it is mere text such as a newline.
        marks = set(self.end_ids[:1]) & set(tokenizer.all_special_ids)
        self.stop_ids: frozenset[int] = frozenset(tokenizer.eos_token_ids) | marks

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return self._size

    def turn(self, text: str, first: bool) -> list[int]:
        """A user's turn and the prompt for a reply, to be appended to the conversation so far.

        first: no token came before, so the template's opening (BOS, system prompt) is included.
        """
        before, after = self._first if first else self._later
        return before + self.encode_text(text) + after

    @property
    def parts(self) -> Parts:
        """The template's ids. UserError where it has no turns alike from the second one on."""
        (first, after), (before, between) = self._first, self._later
        if not before or not between or after != between:
            raise UserError("the model's chat template has no turns that look alike")
        return Parts(first, before, between, self.end_ids)

    def in_replies(self, ids: list[int]) -> list[bool]:
        """Which tokens of a conversation the model said, each reply's end mark included.

        ids may begin anywhere; what is before the first user's turn is taken for a reply. What a
        user types can't look like a turn of the template, so the ids alone tell. Without a
        template nothing is a reply.
        """
        (first, _), (start, prompt) = self._first, self._later
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
        return said

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text: special tokens spelled out in it are text like any other."""
        if not text:
            return []
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _encode_template(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False) if text else []


def load(path: str | Path, eos_token_ids: Iterable[int] | None = None) -> ChatTokenizer:
    """The tokenizer in a model folder. UserError when there is none or it cannot be read.

    Python files beside it are not run. A tokenizer that needs them cannot be read.
    """
    if not any((Path(path) / name).is_file() for name in _FILES):
        raise UserError(f"{path} has no tokenizer: it needs one of {', '.join(_FILES)}")
    ids = None if eos_token_ids is None else list(eos_token_ids)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of every model_type that transformers doesn't have
    try:
        # Neither run nor asked about: without the word, transformers asks on standard input.
        trust = {"trust_remote_code": False}
        return ChatTokenizer(tokenizer_utils.load(Path(path), trust, eos_token_ids=ids))
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise UserError(f"the tokenizer in {path} cannot be loaded: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _take_template_apart(
    tokenizer: tokenizer_utils.TokenizerWrapper,
) -> tuple[tuple[str, str], tuple[str, str], str]:
    """(before, after) the user's text in the first turn and in later ones, and a reply's end.

    A base model without a chat template gets its text as it is.
    """
    if not tokenizer.has_chat_template:
        return ("", ""), ("", ""), ""

    def render(texts: list[str], prompt: bool) -> str:
        messages = [
            {"role": role, "content": text}
            for text, role in zip(texts, ("user", "assistant", "user"), strict=False)
        ]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    opening = render([_USER], True)
    closed = render([_USER, _REPLY], False)
    going_on = render([_USER, _REPLY, _NEXT], True)
    if _USER not in opening or _REPLY not in closed or _NEXT not in going_on:
        raise UserError("this model's chat template drops or rewrites texts; it cannot be used")
    end = closed.rpartition(_REPLY)[2]
    before, _, after = going_on.rpartition(_REPLY)[2].partition(_NEXT)
    return _split(opening, _USER), (before.removeprefix(end), after), end


def _split(text: str, word: str) -> tuple[str, str]:
    before, _, after = text.partition(word)
    return before, after
