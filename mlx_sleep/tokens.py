"""Text to token ids and back, on the tokenizers library. Knows no chat, no model.

A tokenizer takes added tokens such as `<|im_end|>` out of a text before it looks at anything else.
From a template they must be taken, from what a user types never. So a template's text is cut at
them here, and what lies between goes through a copy of the tokenizer that has no such tokens.
"""

from __future__ import annotations

import json
import re
from typing import Any, Literal

from mlx_lm.tokenizer_utils import StreamingDetokenizer
from tokenizers import Encoding, Tokenizer

from .utils.errors import UserError, is_failure

After = Literal["nothing", "token", "text"]
"""What stands before a text: sentencepiece's mark of a first word depends on it."""

Pieces = list[str | int]
"""Text, the id of a control token, text, ..., text: in turn, and texts may be empty."""


class Tokens:
    """Ids as the tokenizer gives them for a whole text, of which parts can't hold control tokens.

    controls  ids of the added tokens, special or not, save for runs of white space
    """

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._description = json.loads(backend.to_str())
        added = backend.get_added_tokens_decoder()
        self.controls = frozenset(i for i, token in added.items() if not _is_space(token.content))
        unknown = _drop_controls(self._description, {added[i].content for i in self.controls})
        # An unknown character may have the id of a control token.
        self._unknown = {i for i, token in added.items() if token.content == unknown}
        self._kept = {token.content: i for i, token in added.items() if i not in self.controls}
        self._plain: dict[After, Tokenizer] = {}

    @property
    def largest_id(self) -> int:
        """The largest id that a text can have."""
        ids = self._backend.get_vocab(with_added_tokens=True).values()
        return max(set(ids) - self.controls)

    def cut(self, text: str) -> Pieces:
        """A template's text, cut at its control tokens."""
        self._backend.encode_special_tokens = False
        encoding = _encoding(self._backend, text)
        pieces: Pieces = []
        at = 0
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token in self.controls - self._unknown:
                pieces += [text[at:start], token]
                at = end
        return [*pieces, text[at:]]

    def ids(self, pieces: Pieces, after: After = "nothing") -> list[int]:
        """The ids of pieces; nothing in their texts is taken for a control token."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
                after = "token"
            elif piece:
                ids += self._encode(piece, after)
                after = "text"
        return ids

    def _encode(self, text: str, after: After) -> list[int]:
        encoding = _encoding(self._without_prefixes(after), text)
        found = zip(encoding.ids, encoding.tokens, strict=True)
        ids = [self._kept.get(token, i) for i, token in found]
        if (self.controls - self._unknown).intersection(ids):  # a vocabulary that has it as a word
            raise UserError("this model can't read that text: it spells one of its control tokens")
        return ids

    def _without_prefixes(self, after: After) -> Tokenizer:
        """The plain tokenizer that puts no mark of a first word where the whole one would not."""
        if after not in self._plain:
            steps = {name: self._description[name] for name in ("normalizer", "pre_tokenizer")}
            if after != "nothing":
                same, inside = steps, after == "text"
                steps = {name: _without_prefix(step, inside) for name, step in steps.items()}
                if steps == same:  # reading a large vocabulary again takes a second
                    self._plain[after] = self._without_prefixes("nothing")
                    return self._plain[after]
            self._plain[after] = Tokenizer.from_str(json.dumps({**self._description, **steps}))
        return self._plain[after]


def _encoding(tokenizer: Tokenizer, text: str) -> Encoding:
    """UserError where the tokenizer's regular expressions come to no end: their library gives up
    after ten million steps of one match. What is slow at each of many places is not bounded."""
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except BaseException as error:  # a panic
        if not is_failure(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"this model's tokenizer can't read that text: {reason}") from error


class Detokenizer(StreamingDetokenizer):
    """The text of ids that come one by one: its segments, joined, are the text of all the ids.

    tokenizer  one of transformers, or a wrapper of one
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        self.offset, self.text = 0, ""
        self.tokens: list[int] = []

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        # After a byte, the next one may change what it is; after half a character too.
        if not _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or ""):
            self._take(self._decoded().rstrip("\ufffd"))

    def finalize(self) -> None:
        self._take(self._decoded())

    def _decoded(self) -> str:
        return self._tokenizer.decode(self.tokens, clean_up_tokenization_spaces=False)

    def _take(self, text: str) -> None:
        self.text += text[len(self.text) :]


_BYTE = re.compile("<0x[0-9A-F]{2}>")  # as sentencepiece writes it


def joined(first: Pieces, *others: Pieces) -> Pieces:
    """Pieces one after the other; texts that meet become one."""
    whole = list(first)
    for pieces in others:
        whole[-1:] = [f"{whole[-1]}{pieces[0]}", *pieces[1:]]
    return whole


def _is_space(content: str) -> bool:
    """Whether an added token is text after all: indentation, or blank lines."""
    return not content.replace("▁", " ").strip()


def _drop_controls(description: dict, names: set[str]) -> str | None:
    """Takes control tokens out of a tokenizer's description: those that are looked for in a text,
    and the vocabulary's words of the same spelling. The word for the unknown stays: its name."""
    description["added_tokens"] = [
        token for token in description["added_tokens"] if token["content"] not in names
    ]
    description["post_processor"] = description["truncation"] = description["padding"] = None
    model = description["model"]
    if isinstance(model["vocab"], list):  # Unigram: a place in the list is an id
        i = model.get("unk_id")
        unknown = None if i is None else model["vocab"][i][0]
        names = names - {unknown}
        model["vocab"] = [[f"\0{w}" if w in names else w, score] for w, score in model["vocab"]]
        return unknown
    unknown = model.get("unk_token")
    names = names - {unknown}
    model["vocab"] = {word: i for word, i in model["vocab"].items() if word not in names}
    if "merges" in model:
        model["merges"] = [(a, b) for a, b in model["merges"] if names.isdisjoint((a, b, a + b))]
    return unknown


def _without_prefix(step: Any, inside: bool) -> Any:
    """A normalizer or pre-tokenizer, as JSON, for a text that is not the first, or that goes on
    inside one: what it puts before a text is left out as far as that place has none."""
    if not isinstance(step, dict):
        return step
    if inside and step["type"] == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    step = dict(step)
    if step.get("prepend_scheme") == "first" or (inside and "prepend_scheme" in step):
        step["prepend_scheme"] = "never"
    if inside and "add_prefix_space" in step:
        step["add_prefix_space"] = False
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            step[name] = [_without_prefix(part, inside) for part in step[name]]
    return step
