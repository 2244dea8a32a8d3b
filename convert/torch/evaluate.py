"""What a retrofit remembers, teacher-forced: counts over batches of lives it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from .loss import ROWS, LifeBatch
from .retrofit import Retrofit

AGES = ((0, 0), (1, 3), (4, 7), (8, 15))  # windows before the answer's, least and most


@torch.no_grad()
def evaluate(model: Retrofit, batches: Iterable[dict[str, np.ndarray]]) -> dict[str, float]:
    """Shares predicted right, over arrays as `LifeBatch.from_arrays` takes them.

    values: tokens of values; whole_values: values with all their tokens right; refusals: replies
    that nothing was told, whole; zeroed: value tokens where each window starts with S = 0, which
    is what the window itself tells. values_0, values_1_3 and so on: value tokens by the number of
    the window in its life, or by `age` [B, W, T] (windows since the fact was told) if it's there.
    """
    right: dict[str, float] = {}
    count: dict[str, float] = {}

    def add(name: str, hits: np.ndarray) -> None:
        right[name] = right.get(name, 0.0) + float(hits.sum())
        count[name] = count.get(name, 0) + hits.size

    for arrays in batches:
        shape = arrays["tokens"].shape
        value = arrays["value"] & (arrays["weight"] > 0) & ~arrays["kl"][..., None]
        hits = predicted(model, arrays)
        if "refusal" in arrays:
            value &= ~arrays["refusal"]
            add("refusals", whole(hits, arrays["refusal"]))
        add("values", hits[value])
        add("whole_values", whole(hits, value))
        alone = {n: x.reshape(-1, 1, *x.shape[2:]) for n, x in arrays.items()}
        add("zeroed", predicted(model, alone).reshape(shape)[value])
        age = arrays.get("age")
        if age is None:
            age = np.broadcast_to(np.arange(shape[1])[:, None], shape)
        for low, high in AGES:
            chosen = hits[value & (age >= low) & (age <= high)]
            if chosen.size:
                add(f"values_{low}" if low == high else f"values_{low}_{high}", chosen)
    return {name: right[name] / count[name] for name in right if count[name]}


def predicted(model: Retrofit, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[B, W, T] bool: which tokens with a weight are the model's argmax (False for the others)."""
    batch = LifeBatch.from_arrays(arrays, model.embedding.device, fold=model.adapter.fold)
    h, _ = model.hidden(batch.tokens, batch.mask, writes=batch.writes)
    rows = h.flatten(0, 2)[batch.at].split(ROWS)
    best = [model.logits(part).argmax(-1) for part in rows]
    hits = np.zeros(arrays["tokens"].size, bool)
    if best:
        hits[batch.at.cpu().numpy() + 1] = (torch.cat(best) == batch.targets).cpu().numpy()
    return hits.reshape(arrays["tokens"].shape)


def whole(hits: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """For each run of marks along the last axis, whether all of its tokens are hits."""
    padded = np.pad(marks, [(0, 0)] * (marks.ndim - 1) + [(1, 1)])
    change = np.diff(padded.astype(np.int8), axis=-1)
    misses = np.concatenate([np.zeros_like(hits[..., :1], int), (~hits).cumsum(-1)], -1)
    return misses[change == 1] == misses[change == -1]
