"""A chat template, taken apart once: what stands around the texts of a chat.

It is rendered for a few chats of stand-in texts. Knows no session, and nobody's texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .thoughts import Thinking
from .tokens import Pieces, Tokens
from .utils.errors import UserError

# What templates call their switch (Qwen, GLM, SmolLM3; Granite, DeepSeek; Command A). Seed's has
# thinking_budget.
_SWITCHES = ("enable_thinking", "thinking", "reasoning")
_ON: dict[str, Any] = dict.fromkeys(_SWITCHES, True)
_OFF: dict[str, Any] = {**dict.fromkeys(_SWITCHES, False), "thinking_budget": 0}

# Stand-ins for the texts of a conversation; no template contains or alters such words.
TEXTS = ("USERxTEXTx1", "REPLYxTEXTx1", "USERxTEXTx2", "REPLYxTEXTx2", "USERxTEXTx3")
_SYSTEM = "SYSTEMxTEXTx1"


class Template(NamedTuple):
    """What stands around the texts of a chat.

    first   before the user's first text, from BOS on
    prompt  after it, up to the reply; after_later after a later text
    past    in their place once the reply is in the past
    end     after a reply, through its end mark
    before  from there to the next text of the user
    mark    the first control token after a reply, if any
    """

    first: Pieces
    prompt: Pieces
    end: Pieces
    before: Pieces
    after_later: Pieces
    past: Pieces
    mark: set[int]


class Apply:
    """A chat's texts, the user's first, through the template: ids, or text.

    switch  more arguments of the template
    """

    def __init__(self, tokenizer: TokenizerWrapper, switch: dict[str, Any] | None = None):
        self.tokenizer, self.switch = tokenizer, switch or {}

    def __call__(
        self,
        texts: Iterable[str],
        tokenize: bool = True,
        prompt: bool = True,
        system: str | None = None,
    ) -> Any:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
        ]
        return self.tokenizer.apply_chat_template(
            messages, tokenize=tokenize, add_generation_prompt=prompt, **self.switch
        )


def has_switch(tokenizer: TokenizerWrapper) -> bool:
    """Whether the template turns thinking on and off."""
    if not tokenizer.has_chat_template:
        return False
    texts = [Apply(tokenizer, each)(TEXTS[:1], tokenize=False) for each in (_ON, _OFF)]
    return texts[0] != texts[1]


def switch(tokenizer: TokenizerWrapper, thinking: Thinking, thinks: bool) -> dict[str, Any]:
    """The template's arguments for `thinking`. Templates differ in what they call it."""
    if thinking == "auto" or not tokenizer.has_chat_template:
        return {}
    if (thinks or thinking == "on") and not has_switch(tokenizer):
        raise UserError(
            f"this model's chat template has no switch to turn thinking {thinking}; "
            "leave it at auto"
        )
    return _ON if thinking == "on" else _OFF


def take_apart(apply: Apply, tokens: Tokens) -> Template | None:
    """None for a base model without a chat template. UserError for a template that drops texts, or
    that says the past in another way when more has come."""
    if not apply.tokenizer.has_chat_template:
        return None
    user, reply, later = TEXTS[:3]
    opening = apply(TEXTS[:1], tokenize=False)
    closed = apply(TEXTS[:2], tokenize=False, prompt=False)
    longer = apply(TEXTS[:3], tokenize=False)
    longest = apply(TEXTS, tokenize=False)
    if user not in opening or reply not in closed or any(text not in longest for text in TEXTS):
        raise UserError("this model's chat template drops or rewrites texts; it cannot be used")

    before, _, prompt = opening.partition(user)
    past, _, going_on = longer.partition(reply)
    between, _, after_later = going_on.partition(later)
    said = past.removeprefix(before + user)  # before the reply, once it is in the past
    same = before + user + said + reply + between + later
    same += said + TEXTS[3] + between + TEXTS[4] + after_later
    # A prompt may say more than the past does (a <think> that opens), or leave some to the model.
    if same != longest or not (said.startswith(prompt) or prompt.startswith(said)):
        raise UserError(
            "this model's chat template rewrites what was said before; it cannot be used here, "
            "where no token is read twice"
        )

    first, prompt = _around(tokens.cut(opening), user)
    past_of_all, rest = _around(tokens.cut(longer), reply)
    past_pieces = _around(past_of_all, user)[1]
    between, after_later = _around(rest, later)
    end, before = _split_end(
        _around(tokens.cut(closed), reply)[1], between, apply.tokenizer.eos_token_ids
    )
    mark = {piece for piece in between[1:2] if isinstance(piece, int)}
    return Template(first, prompt, end, before, after_later, past_pieces, mark)


def system_opening(apply: Apply, tokens: Tokens) -> tuple[Pieces, Pieces]:
    """What stands before a system prompt, and from there to the user's first text.

    Some templates have a place of their own for it, others put it into the user's first turn.
    UserError where the template has none, or one that moves as the chat goes on.
    """
    if not apply.tokenizer.has_chat_template:
        raise UserError("this model has no chat template, so it takes no system prompt")
    try:
        opening = apply(TEXTS[:1], tokenize=False, system=_SYSTEM)
        longer = apply(TEXTS[:3], tokenize=False, system=_SYSTEM)
    except Exception as error:  # a template raises what it likes
        raise UserError("this model's chat template takes no system prompt") from error
    before, _, after = opening.partition(TEXTS[0])
    plain, plain_longer = (apply(TEXTS[:n], tokenize=False) for n in (1, 3))
    if _SYSTEM not in before:
        raise UserError("this model's chat template takes no system prompt")
    if (after, longer.partition(TEXTS[0])) != (
        plain.partition(TEXTS[0])[2],
        (before, TEXTS[0], plain_longer.partition(TEXTS[0])[2]),
    ):
        raise UserError(
            "this model's chat template moves the system prompt as a chat goes on; it cannot be "
            "used here, where no token is read twice"
        )
    return _around(_around(tokens.cut(opening), TEXTS[0])[0], _SYSTEM)


def _around(pieces: Pieces, word: str) -> tuple[Pieces, Pieces]:
    """What is before and after the text `word`."""
    at = next(i for i, piece in enumerate(pieces) if isinstance(piece, str) and word in piece)
    before, _, after = str(pieces[at]).partition(word)
    return [*pieces[:at], before], [after, *pieces[at + 1 :]]


def _split_end(closed: Pieces, between: Pieces, eos: Iterable[str | int]) -> tuple[Pieces, Pieces]:
    """What stands between a reply and the next turn, as (the reply's end, the rest).

    closed is what follows the last reply of a conversation. Some templates write no end mark there,
    or another one; what stands between turns is what the model was trained on.
    """
    n = 0
    while n < min(len(closed), len(between)) and closed[n] == between[n]:
        n += 1
    if n < 2 and len(between) > 1 and (between[1] in set(eos) or len(between) > 3):
        n = 2  # the first control token ends the reply, the last one opens the turn
    if n % 2 and n < len(between):  # a text that a control token follows, or none
        return between[:n], ["", *between[n:]]
    n -= n % 2
    return [*between[:n], ""], between[n:] or [""]
