"""The loss of a retrofit: cross-entropy of what should be said, and closeness to the base.

The tied head is frozen, so its gradient with respect to h is computed with the loss, some rows at
a time: the logits of a batch are never held at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ROWS = 1024  # of logits at a time


@dataclass
class LifeBatch:
    """A batch of lives on its device, with the positions of its losses picked out beforehand.

    tokens [B, W, T] int64; mask, writes [B, W, T] bool (`Retrofit.hidden`). at [N]: flat positions
    whose output predicts `targets` [N] with `weights` [N] float32; value, refusal [N] bool: targets
    inside a value and in a reply that nothing was told. kl_windows [n]: flat numbers of the
    windows held to the base; kl_at [M]: flat positions of theirs whose outputs are compared, and
    kl_base_at [M] the same within those windows alone. real: number of real tokens.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    writes: torch.Tensor | None
    at: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    value: torch.Tensor
    refusal: torch.Tensor
    kl_windows: torch.Tensor
    kl_at: torch.Tensor
    kl_base_at: torch.Tensor
    real: int

    @classmethod
    def from_arrays(
        cls,
        arrays: dict[str, np.ndarray],
        device="cpu",
        value_weight: float = 4.0,
        fold: str = "all",
    ):
        """From the arrays of a task: tokens [B, W, T] int32 padded on the right, mask bool, weight
        float32 (of predicting token t from those before it in its window), value bool, reply bool,
        kl [B, W] bool; and perhaps refusal [B, W, T] bool (`mark_refusals`). Value tokens weigh
        value_weight times as much, refusals don't. fold: "all", or "user" where the tokens of
        replies write nothing into S.
        """
        tokens, weight = arrays["tokens"].astype(np.int64), arrays["weight"]
        if weight[..., 0].any():
            raise ValueError("the first token of a window cannot be predicted from inside it")
        B, W, T = tokens.shape
        kl = arrays["kl"].reshape(-1)
        # Windows of ordinary chat are held to the base and to nothing else.
        wanted = (weight > 0) & ~arrays["kl"][..., None]
        target = np.flatnonzero(wanted)
        refusal = arrays.get("refusal")
        kl_windows = np.flatnonzero(kl)
        replies = arrays["reply"].reshape(-1, T)[kl_windows].copy()
        replies[:, 0] = False
        window, position = np.nonzero(replies)
        if refusal is None:
            refusal = np.zeros_like(arrays["value"])
        refusal = refusal.reshape(-1)[target]
        value = arrays["value"].reshape(-1)[target] & ~refusal
        arrays_of_fields = {
            "tokens": tokens,
            "mask": arrays["mask"],
            "writes": ~arrays["reply"] if fold == "user" else None,
            "at": target - 1,
            "targets": tokens.reshape(-1)[target],
            "weights": weight.reshape(-1)[target] * np.where(value, value_weight, 1.0),
            "value": value,
            "refusal": refusal,
            "kl_windows": kl_windows,
            "kl_at": kl_windows[window] * T + position - 1,
            "kl_base_at": window * T + position - 1,
        }
        fields: dict[str, Any] = {
            name: None if x is None else _to(x, device) for name, x in arrays_of_fields.items()
        }
        return cls(**fields, real=int(arrays["mask"].sum()))


def _to(x: np.ndarray, device) -> torch.Tensor:
    tensor = torch.from_numpy(x.astype(np.float32) if x.dtype == np.float64 else x)
    if torch.device(device).type == "cuda":  # so that the copy waits for nobody
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def life_loss(model, batch: LifeBatch, kl_weight: float = 1.0, passes: int | None = None):
    """(loss, sums) of a batch under `model` (a `Retrofit`).

    loss: weighted mean cross-entropy, plus kl_weight times the mean KL(base || model) over the
    replies of ordinary windows. sums: name -> tensor without gradient: cross_entropy, kl (means)
    and the numbers of value and refusal tokens and of those predicted right (argmax).
    """
    h, _ = model.hidden(batch.tokens, batch.mask, writes=batch.writes, passes=passes)
    h = h.flatten(0, 2)
    eps = model.config.rms_norm_eps

    def normed(h, at):
        return torch.nn.functional.rms_norm(h[at], h.shape[-1:], model.norm, eps)

    total, hits = HeadCrossEntropy.apply(
        normed(h, batch.at), model.embedding, batch.targets, batch.weights
    )
    loss = cross_entropy = total / batch.weights.sum().clamp(min=1e-6)
    kl = torch.zeros((), device=h.device)
    if batch.kl_at.numel():
        with torch.no_grad():
            windows = batch.tokens.flatten(0, 1)[batch.kl_windows]
            base = normed(model.base_hidden(windows).flatten(0, 1), batch.kl_base_at)
        kl = HeadKL.apply(normed(h, batch.kl_at), base, model.embedding) / batch.kl_at.numel()
        loss = loss + kl_weight * kl
    sums = {
        "cross_entropy": cross_entropy.detach(),
        "kl": kl.detach(),
        "values": batch.value.sum(),
        "values_right": (batch.value & hits).sum(),
        "refusals": batch.refusal.sum(),
        "refusals_right": (batch.refusal & hits).sum(),
    }
    return loss, sums


class HeadCrossEntropy(torch.autograd.Function):
    """(sum of weighted cross-entropies, which targets are the argmax) of a frozen head.

    h [N, D], head [V, D], targets [N], weights [N]; gradient for h alone.
    """

    @staticmethod
    def forward(ctx, h, head, targets, weights):
        wide = torch.promote_types(h.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=h.device)
        grads, hits = [torch.zeros_like(h[:0])], [targets[:0] == 0]
        parts = (x.split(ROWS) for x in (h, targets, weights))
        for rows, target, weight in zip(*parts, strict=True):
            logits = (rows @ head.T).to(wide)
            hits.append(logits.argmax(-1) == target)
            log_p = logits.log_softmax(-1)
            weight = weight.to(wide)
            total -= (log_p.gather(-1, target[:, None])[:, 0] * weight).sum()
            p = log_p.exp_()
            p[torch.arange(len(target), device=h.device), target] -= 1
            grads.append((p * weight[:, None]).to(h.dtype) @ head)
        hits = torch.cat(hits)
        ctx.save_for_backward(torch.cat(grads))
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx, grad, _):
        (grads,) = ctx.saved_tensors
        return grads * grad.to(grads.dtype), None, None, None


class HeadKL(torch.autograd.Function):
    """Sum over rows of KL(p_base || p) of a frozen head: h, base [N, D], head [V, D]."""

    @staticmethod
    def forward(ctx, h, base, head):
        wide = torch.promote_types(h.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=h.device)
        grads = [torch.zeros_like(h[:0])]
        for rows, base_rows in zip(h.split(ROWS), base.split(ROWS), strict=True):
            log_p = (rows @ head.T).to(wide).log_softmax(-1)
            log_base = (base_rows @ head.T).to(wide).log_softmax(-1)
            p_base = log_base.exp()
            total += (p_base * (log_base - log_p)).sum()
            grads.append((log_p.exp_() - p_base).to(h.dtype) @ head)
        ctx.save_for_backward(torch.cat(grads))
        return total

    @staticmethod
    def backward(ctx, grad):
        (grads,) = ctx.saved_tensors
        return grads * grad.to(grads.dtype), None, None
