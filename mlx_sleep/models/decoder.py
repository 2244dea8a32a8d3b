"""What this package's own architectures share: embedding, blocks, and a head that may be tied."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from .base import LayerState, SleepConfig, SleepModel


class DecoderModel(SleepModel):
    """A decoder whose parts a subclass names as its checkpoints do.

    args  a ModelArgs with vocab_size, hidden_size, tie_word_embeddings and sleep
    """

    def __init__(self, args: Any, blocks: int):
        super().__init__(SleepConfig.from_dict(args.sleep), blocks)
        self.args = args

    @property
    def decoder(self) -> nn.Module:
        """The module that has the blocks, as `layers`."""
        return self

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding, and the head where it is tied."""
        raise NotImplementedError

    @property
    def block_modules(self) -> list[nn.Module]:
        return self.decoder.layers

    def add_head(self) -> None:
        """Gives the model an lm_head, unless it is tied to the embedding."""
        if not self.args.tie_word_embeddings:
            self.lm_head = nn.Linear(self.args.hidden_size, self.args.vocab_size, bias=False)

    def unembed(self, h):
        """h [..., hidden] after the final norm -> logits [..., vocab]"""
        return self.lm_head(h) if "lm_head" in self else self.embedding.as_linear(h)

    def embed(self, tokens):
        return self.embedding(tokens)

    def block(self, i: int, h, layer_state: LayerState, mask=None):
        return self.decoder.layers[i](h, layer_state, mask)
