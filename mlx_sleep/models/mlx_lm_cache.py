"""mlx-lm's caches as views of a layer's state, so that its layers run over ours unchanged.

mlx-lm's layers write into a cache object; a state here is a value. A view is made from a layer's
dict for one call, takes what the layer writes, and gives the new dict. It offers what mlx-lm's
layers use of KVCache (offset, update_and_fetch) and CacheList (indexing), and is an ArraysCache.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from .attention import attention_mask
from .base import LayerState, append_kv

_KV = ("keys", "values", "length", "offset", "valid")


class KVView:
    """A KVCache over the KV entries of a layer's dict."""

    def __init__(self, layer: LayerState, mask=None):
        self.state = {name: layer[name] for name in _KV if name in layer}
        self.mask = mask

    @property
    def offset(self):
        """Tokens seen so far, for RoPE: int, or [B] where rows are padded."""
        return self.state.get("offset", 0)

    def update_and_fetch(self, keys, values):
        self.state = append_kv(self.state, keys, values, self.mask)
        end = self.state["length"]
        return self.state["keys"][:, :, :end], self.state["values"][:, :, :end]


class ArraysView(ArraysCache):
    """An ArraysCache with the recurrent entries of a layer's dict, for one call."""

    def __init__(self, arrays: list, mask=None):
        super().__init__(len(arrays))
        self.cache = arrays
        self.lengths = None if mask is None else mask.sum(axis=1).astype(mx.int32)


@dataclass
class KVPart:
    """How mlx-lm keeps the KV of a layer. sliding: newest tokens that a token sees, or None."""

    sliding: int | None = None

    def view(self, layer: LayerState, mask=None) -> KVView:
        return KVView(layer, mask)

    def entries(self, view: KVView) -> LayerState:
        return view.state

    def mask(
        self, layer: LayerState, h, mask=None, sliding: int | None = None, arrays: bool = False
    ):
        """The attention mask of the new tokens h [B, T, hidden]; see `attention.attention_mask`.

        arrays gives a bool array in place of "causal", which not every layer understands.
        """
        limits = [n for n in (self.sliding, sliding) if n is not None]
        B, T, _ = h.shape
        past = layer.get("length", 0)
        after: LayerState = {}
        if mask is not None or "valid" in layer:
            old = layer["valid"][:, :past] if "valid" in layer else mx.ones((B, past), mx.bool_)
            new = mx.ones((B, T), mx.bool_) if mask is None else mask
            after["valid"] = mx.concatenate([old, new], axis=1)
        sees = attention_mask(T, past, after, min(limits) if limits else None)
        if arrays and isinstance(sees, str):
            sees = mx.arange(past + T) <= mx.arange(past, past + T)[:, None]
        return sees


@dataclass
class RecurrentPart:
    """How mlx-lm keeps the recurrent arrays of a layer.

    slots says what each is, and is learned from the first call: S has four axes (or is the last
    of them), the others are left contexts of convolutions, [B, K-1, C]. With several of those
    (one each for q, k and v) the state's `conv` is all of them side by side.
    """

    size: int
    slots: tuple[str, ...] = ()
    widths: tuple[int, ...] = field(default=())

    def learn(self, view: ArraysView) -> None:
        """From a view that a layer has written. ValueError for an unknown kind of state."""
        axes = [None if x is None else x.ndim for x in view.cache]
        slots = ["conv" if n == 3 else "fast_weights" if n == 4 else "unknown" for n in axes]
        if axes == [3, 3]:  # Mamba-1: the convolution, then S [B, C, N]
            slots[1] = "fast_weights"
        widths = [x.shape[-1] for x, slot in zip(view.cache, slots, strict=True) if slot == "conv"]
        if "unknown" in slots or slots.count("fast_weights") > 1:
            raise ValueError(f"recurrent arrays of {axes} axes")
        self.slots, self.widths = tuple(slots), tuple(widths)

    def view(self, layer: LayerState, mask=None) -> ArraysView:
        if not self.slots or "conv" not in layer:
            parts: list = [None] * self.size
        else:
            ends = [sum(self.widths[: n + 1]) for n in range(len(self.widths) - 1)]
            parts = list(mx.split(layer["conv"], ends, axis=-1)) if ends else [layer["conv"]]
        convs = iter(parts)
        arrays = [
            next(convs) if slot == "conv" else layer.get(slot)
            for slot in self.slots or ["conv"] * self.size
        ]
        return ArraysView(arrays, mask)

    def entries(self, view: ArraysView) -> LayerState:
        convs = [x for x, slot in zip(view.cache, self.slots, strict=True) if slot == "conv"]
        layer: LayerState = {}
        if convs:
            layer["conv"] = convs[0] if len(convs) == 1 else mx.concatenate(convs, axis=-1)
        if "fast_weights" in self.slots:
            S = view.cache[self.slots.index("fast_weights")]
            layer["fast_weights"] = S.astype(mx.float32)
        return layer


class LayerCache:
    """What one layer of an mlx-lm model keeps: KV, recurrent arrays, both side by side, or nothing.

    prototype is the layer's own cache as the model makes it, or None. ValueError for a kind that
    is not known here.
    """

    def __init__(self, prototype):
        self.is_list = isinstance(prototype, CacheList)
        members = list(prototype.caches) if self.is_list else [prototype]
        self.parts = [_part(cache) for cache in members if cache is not None]
        kv = [p for p in self.parts if isinstance(p, KVPart)]
        recurrent = [p for p in self.parts if isinstance(p, RecurrentPart)]
        if len(kv) > 1 or len(recurrent) > 1:
            raise ValueError("several caches of a kind in one layer")
        self.kv = kv[0] if kv else None
        self.recurrent = recurrent[0] if recurrent else None

    def views(self, layer: LayerState, mask=None) -> list:
        return [part.view(layer, mask) for part in self.parts]

    def argument(self, views: list):
        """What mlx-lm's layer takes as its cache."""
        if self.is_list:
            return tuple(views)
        return views[0] if views else None

    def learn(self, views: list) -> None:
        for part, view in zip(self.parts, views, strict=True):
            if isinstance(part, RecurrentPart):
                part.learn(view)

    def entries(self, views: list) -> LayerState:
        layer: LayerState = {}
        for part, view in zip(self.parts, views, strict=True):
            layer.update(part.entries(view))
        return layer


def _part(cache) -> KVPart | RecurrentPart:
    if isinstance(cache, RotatingKVCache) and cache.keep == 0:
        return KVPart(sliding=cache.max_size)
    if type(cache) is KVCache:
        return KVPart()
    if isinstance(cache, ArraysCache):
        return RecurrentPart(size=len(cache.cache))
    raise ValueError(f"a cache of type {type(cache).__name__}")
