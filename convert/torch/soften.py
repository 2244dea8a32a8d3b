"""Another epsilon for the norm of what a trained retrofit reads from S, at the same loudness."""

from __future__ import annotations

from dataclasses import replace

import torch

from .loss import LifeBatch
from .retrofit import Retrofit, mixer_output

MOST = 4.0  # a head that hardly ever reads anything is not made louder than so many times


@torch.no_grad()
def soften(model: Retrofit, read_eps: float, batch: LifeBatch) -> None:
    """Gives every sleep layer of `model` this read_eps, in place.

    The columns of o_proj that read a head are scaled by one number, such that over the real tokens
    of `batch` the head's normed read has the mean square that it had: the model goes on where it
    was, but for the difference between faint reads and others.
    """
    squares: list[torch.Tensor] = []

    def kept(o, *rest):
        squares.append(o.square().mean(-1))  # [B, W, T, H]
        return mixer_output(o, *rest)

    outputs = [mixer.output for mixer in model.mixers]
    for mixer in model.mixers:
        mixer.output = kept
    model.hidden(batch.tokens, batch.mask, writes=batch.writes, passes=1)
    for mixer, output, square in zip(model.mixers, outputs, squares, strict=True):
        mixer.output = output
        square = square[batch.mask]
        before, after = ((square / (square + eps)).mean(0) for eps in (mixer.eps, read_eps))
        scale = (before / after).sqrt().clamp(max=MOST)
        mixer.o_proj.weight.mul_(scale.repeat_interleave(mixer.d))
        mixer.eps = mixer.o_norm.eps = read_eps
    model.adapter = replace(model.adapter, read_eps=read_eps)
