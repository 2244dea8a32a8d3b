"""Lives in a model's own tokens and chat template, made in this process."""

from __future__ import annotations

from ...utils.errors import UserError
from .life import CHAT, Lives
from .life_tokens import LifeEncoder, Template, fast


class ChatSource:
    """What `life_batches.Source` is to worker processes. tokenizer: a ChatTokenizer; split, seed,
    chat and pad as for `Source`. UserError for a template that lives can't be written in."""

    def __init__(self, tokenizer, split: str, seed: int = 0, chat: CHAT = (), pad: int = 0):
        parts = tokenizer.parts
        before = tuple(parts.before)
        opening = tuple(parts.first[: len(parts.first) - len(before)])
        if (*opening, *before) != tuple(parts.first):
            raise UserError("the model's chat template opens a chat in a way that lives can't")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError("the model needs a tokenizer.json, which tells where tokens lie")
        template = Template(opening, before, tuple(parts.between), tuple(parts.end), pad)
        self._lives = Lives(LifeEncoder(fast(backend), template), split, seed, chat)

    def lives(self) -> Lives:
        return self._lives
