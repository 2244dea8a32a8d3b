"""How the tokens of a reply are drawn: mlx-lm's samplers, by mlx-lm's names.

A model says in its generation_config.json how it wants to be sampled. It knows no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from .models.config import Generation
from .utils.errors import UserError

REPETITION_CONTEXT = 20
"""Newest tokens that a repetition penalty looks at, as in mlx-lm."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one reply after another. UserError for one that makes no sense.

    temp                temperature; 0 is greedy, and leaves only the repetition penalty
    top_p               draw from the likeliest tokens of this mass; 1 is all
    top_k               draw from so many of the likeliest tokens; 0 is all
    min_p               draw from tokens at least this likely, relative to the likeliest; 0 is all
    repetition_penalty  of the last 20 tokens (arXiv 1909.05858); 1 is none
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temp < float("inf"):
            raise UserError(f"the temperature must be 0 or more, not {self.temp}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p must be above 0 and at most 1, not {self.top_p}")
        if self.top_k < 0:
            raise UserError(f"top-k must be 0 (all tokens) or more, not {self.top_k}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p must be from 0 to 1, not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"the repetition penalty must be above 0 (1 is none), not {self.repetition_penalty}"
            )

    @classmethod
    def of(cls, generation: Generation) -> Sampling:
        """What a model's generation_config.json asks for, as transformers reads it.

        Greedy where do_sample is false or the temperature 0. A file that says nothing about
        sampling gets transformers' chat defaults: temperature 0.7, top-k 50. UserError for a
        value out of range.
        """
        names = ("temperature", "top_p", "top_k", "min_p")
        found = {name: getattr(generation, name) for name in names}
        found = {name: value for name, value in found.items() if value is not None}
        penalty = generation.repetition_penalty or 1.0
        if generation.do_sample is False or found.get("temperature") == 0:
            return cls(repetition_penalty=penalty)
        says_nothing = generation.do_sample is None and not found
        temp = found.pop("temperature", 0.7 if says_nothing else 1.0)
        try:
            return cls(temp=temp, repetition_penalty=penalty, **{"top_k": 50, **found})
        except UserError as error:
            raise UserError(f"generation_config.json: {error}") from error

    def sampler(self, vocab_size: int) -> Callable[[mx.array], mx.array]:
        """log-probabilities [1, vocab_size] -> token ids [1]"""
        top_k = self.top_k if self.top_k < vocab_size else 0  # mlx-lm refuses all of them
        return make_sampler(temp=self.temp, top_p=self.top_p, min_p=self.min_p, top_k=top_k)

    def processors(self) -> list[Callable[[mx.array, mx.array], mx.array]]:
        """Each is called with the tokens so far [T] and logits [1, V]: logits [1, V]"""
        if self.repetition_penalty == 1:
            return []
        return make_logits_processors(
            repetition_penalty=self.repetition_penalty, repetition_context_size=REPETITION_CONTEXT
        )
