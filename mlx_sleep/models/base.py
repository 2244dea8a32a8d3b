"""What every architecture shares: how it sleeps, and the state that it carries.

A state is a list with one dict for each layer (of a looped model: for each loop and layer, the
slot u * num_layers + i). It is a value: functions return a new list and never change the one that
they were given, so a snapshot is nothing but a reference.

    SSM layer        fast_weights  [B, Hv, Dv, Dk] float32   S of the paper
                     conv          [B, K-1, C]               last inputs of the short convolution
    attention layer  keys, values  [B, Hkv, capacity, D]
                     length        int                       slots in use
                     offset        int, or [B] int32         tokens seen so far (for RoPE)
                     valid         [B, capacity] bool        only with padded batches

An SSM layer that turns its keys by RoPE has an offset too.
An absent entry is an empty one: {} is a fresh layer of either kind. A layer with attention and an
SSM side by side has the entries of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..utils import limits, schema
from ..utils.errors import UserError

LayerState = dict[str, Any]
State = list[LayerState]


@dataclass(frozen=True)
class SleepConfig:
    """How a model sleeps (arXiv 2605.26099, section 3).

    passes      N, how often a window is run through the blocks at sleep
    window      L, tokens that the KV cache holds before the model must sleep
    eviction    "hard": the KV cache is dropped; "sliding": its newest L - 1 entries stay
    loop_range  the blocks [lo, hi) that are looped; those outside run once. None is all
    carry_conv  whether the short convolution's left context crosses a boundary. The default, None,
                is False for hard eviction, where only S may cross, and True for sliding
    fold        "all", or "user": tokens of the model's replies then write nothing into S, awake
                and asleep. Only sleep layers of delta attention can do that
    """

    passes: int = 1
    window: int = 256
    eviction: str = "hard"
    loop_range: tuple[int, int] | None = None
    carry_conv: bool | None = None
    fold: str = "all"

    def __post_init__(self):
        if not isinstance(self.passes, int) or self.passes < 1:
            raise UserError(f"sleep passes must be a whole number >= 1, not {self.passes!r}")
        if not isinstance(self.window, int) or self.window < 2:
            raise UserError(f"the sleep window must be a whole number >= 2, not {self.window!r}")
        limits.check("the number of sleep passes", self.passes, limits.PASSES)
        limits.check("the sleep window", self.window, limits.WINDOW)
        if self.eviction not in ("hard", "sliding"):
            raise UserError(
                f'eviction must be "hard" or "sliding", not {schema.shown(self.eviction)}'
            )
        if self.fold not in ("all", "user"):
            raise UserError(f'fold must be "all" or "user", not {schema.shown(self.fold)}')
        if self.loop_range is not None:
            lo, hi = self.loop_range
            if not 0 <= lo < hi:
                raise UserError(f"loop_range must be [lo, hi) with 0 <= lo < hi, not [{lo}, {hi})")
            object.__setattr__(self, "loop_range", (lo, hi))
        if self.carry_conv is None:
            object.__setattr__(self, "carry_conv", self.eviction == "sliding")

    @classmethod
    def from_dict(cls, fields: dict) -> SleepConfig:
        """From the field `sleep` of a config.json. UserError for one that is wrong or unknown."""
        return schema.read(cls, fields, "sleep.", closed=True)

    def attention_window(self, own: int | None = None) -> int | None:
        """Newest tokens that a token sees, itself included: a layer's own limit (None is none),
        and the window's under a sliding eviction."""
        limits = [own, self.window if self.eviction == "sliding" else None]
        return min((n for n in limits if n is not None), default=None)


T = TypeVar("T")


class Config:
    """A dataclass whose fields are those of a config.json."""

    @classmethod
    def from_dict(cls: type[T], config: dict, where: str = "") -> T:
        """See `schema.read`: UserError for a field that is missing or of another type."""
        return schema.read(cls, config, where)


class SleepModel(nn.Module):
    """What a sleep, a session and training ask of an architecture.

    `embed`, `block`, `final_norm` and `head` are apart because a sleep loops over the blocks.
    `sleep` says how the model sleeps; blocks is the number of them, for the check of loop_range.
    `loops` is how often a wake pass runs the blocks: 1, save for a model that was trained looped.
    `carries` says whether blocks hand on more than h, beside it in h's channels: nothing can be put
    between such blocks. `can_fold_user` says whether `hidden` and `block` take `write`, which
    SleepConfig.fold needs.
    `trained_to_sleep` is set when the model is loaded (`checkpoint.TRAINING`).
    """

    loops: int = 1
    carries: bool = False
    can_fold_user: bool = False
    trained_to_sleep: bool = False

    def __init__(self, sleep: SleepConfig, blocks: int):
        super().__init__()
        self.sleep = sleep
        self._blocks = blocks
        if sleep.loop_range and sleep.loop_range[1] > blocks:
            raise UserError(
                f"loop_range ends at {sleep.loop_range[1]}, but the model has {blocks} blocks"
            )

    @property
    def num_layers(self) -> int:
        """The number of blocks: what `block` counts."""
        return self._blocks

    @property
    def block_modules(self) -> list[nn.Module]:
        """The module of each block, in order, with the parameters that `block` uses."""
        raise NotImplementedError

    @property
    def has_fast_weights(self) -> bool:
        """Whether any block has an S: without one there is nothing to sleep into."""
        _, state = self.hidden(mx.zeros((1, 1), mx.int32))  # lazy: nothing is computed
        return any("fast_weights" in layer for layer in state)

    @property
    def vocab_rows(self) -> int:
        """The number of ids: beyond them MLX would read whatever lies there."""
        h, _ = self.hidden(mx.zeros((1, 1), mx.int32))  # lazy: nothing is computed
        return self.head(h).shape[-1]

    def init_state(self, batch_size: int = 1) -> State:
        """The state of a model that has seen nothing: S = 0, no KV."""
        return [{} for _ in range(self.loops * self.num_layers)]

    def embed(self, tokens):
        """tokens [B, T] int32 -> h [B, T, hidden]"""
        raise NotImplementedError

    def block(self, i: int, h, layer_state: LayerState, mask=None):
        """Block i on h [B, T, hidden]; mask [B, T] bool, False for padding on the right."""
        raise NotImplementedError

    def final_norm(self, h):
        """h after the last block of a pass, as the next pass or the head reads it."""
        return h

    def head(self, h):
        """h [..., hidden] -> logits [..., vocab]"""
        raise NotImplementedError

    def choose(self, outputs: list):
        """h [B, T, hidden] that the head reads, of those after each loop: the last."""
        return outputs[-1]

    def loop_outputs(self, tokens, state: State | None = None, mask=None, write=None):
        """h [B, T, hidden] after each loop, as a list, and the new state.

        write [B, T] bool is given on to `block` where there is one: False writes nothing into S.
        """
        options = {} if write is None else {"write": write}
        start = state if state is not None else self.init_state(tokens.shape[0])
        state, outputs = list(start), []
        h, blocks = self.embed(tokens), self.num_layers
        for u in range(self.loops):
            for i in range(blocks):
                before = start[u * blocks + i]
                # A sleep leaves one S, in the slots of the first loop.
                if "fast_weights" not in before and "fast_weights" in start[i]:
                    before = {**before, "fast_weights": start[i]["fast_weights"]}
                h, state[u * blocks + i] = self.block(i, h, before, mask, **options)
            h = self.final_norm(h)
            outputs.append(h)
        return outputs, state

    def hidden(self, tokens, state: State | None = None, mask=None, write=None):
        """One ordinary forward pass without the head: (h [B, T, hidden], state)."""
        outputs, state = self.loop_outputs(tokens, state, mask, write)
        return self.choose(outputs), state

    def __call__(self, tokens, state: State | None = None, mask=None, write=None):
        """One ordinary forward pass: (logits [B, T, vocab], state). T = 1 is the wake step."""
        h, state = self.hidden(tokens, state, mask, write)
        return self.head(h), state


def evict(state: State, sleep: SleepConfig) -> State:
    """The state that crosses the boundary after a sleep: S, and what the eviction keeps."""
    keep = sleep.window - 1 if sleep.eviction == "sliding" else 0
    gone = {*_KV_ENTRIES} if sleep.carry_conv else {*_KV_ENTRIES, "conv"}
    kept = []
    for layer in state:
        rest = {name: x for name, x in layer.items() if name not in gone}
        if keep and "offset" in layer:  # of a layer that counts, with or without KV
            rest["offset"] = layer["offset"]
        kept.append({**rest, **_trim(layer, keep)} if keep and "keys" in layer else rest)
    return kept


def _trim(layer: LayerState, keep: int) -> LayerState:
    """The newest `keep` entries of one KV cache, row by row when rows are padded."""
    length = layer["length"]
    arrays = {name: layer[name] for name in ("keys", "values")}
    start = max(0, length - keep)
    if "valid" not in layer:
        arrays = {name: x[:, :, start:length] for name, x in arrays.items()}
        return {**arrays, "length": length - start, "offset": layer["offset"]}
    valid = layer["valid"][:, :length]
    # Padding first, tokens last and in order: argsort of (valid, slot).
    order = mx.stop_gradient(mx.argsort(valid * length + mx.arange(length), axis=1)[:, start:])
    arrays = {
        name: mx.take_along_axis(x, order[:, None, :, None], axis=2) for name, x in arrays.items()
    }
    valid = mx.take_along_axis(valid, order, axis=1)
    return {**arrays, "length": length - start, "offset": layer["offset"], "valid": valid}


def append_kv(layer: LayerState, keys, values, mask=None) -> LayerState:
    """The KV cache with keys and values [B, Hkv, T, D] after those of `layer`.

    mask [B, T] bool marks real tokens; rows may then hold different numbers of them.
    """
    B, H, T, _ = keys.shape
    seen = T if mask is None else mask.sum(axis=1).astype(mx.int32)
    length, offset = layer.get("length", 0), layer.get("offset", 0)
    valid = layer.get("valid")
    if mask is not None or valid is not None:
        old = valid if valid is not None else mx.ones((B, length), dtype=mx.bool_)
        new = mask if mask is not None else mx.ones((B, T), dtype=mx.bool_)
        valid = mx.concatenate([old[:, :length], new], axis=1)
    if length:
        end = length + T
        if end > layer["keys"].shape[2]:
            more = -(-T // 256) * 256
            old = {}
            for name, new in zip(_KV, (keys, values), strict=True):  # not always of one width
                room = mx.zeros((B, H, more, new.shape[3]), new.dtype)
                old[name] = mx.concatenate([layer[name][:, :, :length], room], axis=2)
        else:
            old = layer
        # Functional: MLX writes in place when nothing else holds the old buffer.
        at = mx.array([length])
        keys = mx.slice_update(old["keys"], keys, at, axes=(2,))
        values = mx.slice_update(old["values"], values, at, axes=(2,))
    grown = {"keys": keys, "values": values, "length": length + T, "offset": offset + seen}
    return grown if valid is None else {**grown, "valid": valid}


def lend_kv(state: State, after: State) -> State:
    """`state`, with its KV in the buffers of a state `after` that has read on from it.

    The same values: a buffer's first `length` slots are those of the older state. So nothing holds
    the older buffers, and MLX can append to them in place.
    """
    return [
        {**old, **{name: new[name] for name in (*_KV, "valid") if name in old}}
        for old, new in zip(state, after, strict=True)
    ]


_KV = ("keys", "values")
_KV_ENTRIES = (*_KV, "length", "offset", "valid")


def kv_bytes(state: State) -> int:
    """Bytes of the KV entries in use (not of the room kept for growth)."""
    total = 0
    for layer in state:
        for name in _KV:
            if name in layer:
                x = layer[name]
                total += x.nbytes // x.shape[2] * layer["length"]
    return total


def fast_weight_bytes(state: State) -> int:
    """Bytes of S in all layers: fixed, whatever has been folded in.

    A looped model has one S a layer after a sleep, and awake one for each loop.
    """
    return sum(layer["fast_weights"].nbytes for layer in state if "fast_weights" in layer)


def flatten_state(state: State) -> dict[str, mx.array]:
    """The state as named arrays ("layers.1.fast_weights"), for a file."""
    arrays = {}
    for i, layer in enumerate(state):
        for name, x in layer.items():
            if name in ("keys", "values", "valid"):
                x = x[..., : layer["length"], :] if name in _KV else x[:, : layer["length"]]
            elif name == "length":
                continue  # the arrays' own shape
            arrays[f"layers.{i}.{name}"] = x if isinstance(x, mx.array) else mx.array(x, mx.int32)
    return arrays


def unflatten_state(arrays: dict[str, mx.array], num_layers: int) -> State:
    """The inverse of `flatten_state`. UserError when the names don't fit the model."""
    state: State = [{} for _ in range(num_layers)]
    for name, x in arrays.items():
        prefix, _, rest = name.partition(".")
        index, _, entry = rest.partition(".")
        if prefix != "layers" or not index.isdigit() or int(index) >= num_layers:
            raise UserError(f"unexpected array {name!r} in a saved state of {num_layers} layers")
        state[int(index)][entry] = x
    for layer in state:
        if "keys" in layer:
            layer["length"] = layer["keys"].shape[2]
        if "offset" in layer and layer["offset"].ndim == 0:
            layer["offset"] = layer["offset"].item()
    return state


def state_problem(arrays: dict[str, mx.array], wanted: dict[str, mx.array]) -> str | None:
    """Why these arrays of a file are not a state like `wanted` (both as of `flatten_state`).

    wanted is not evaluated; its KV cache may have another length.
    """
    if other := sorted(arrays.keys() ^ wanted.keys()):
        return f"{other[0]!r} is {'one too many' if other[0] in arrays else 'not there'}"
    lengths: dict[str, set[int]] = {}
    for name, x in arrays.items():
        like, (layer, _, entry) = wanted[name], name.rpartition(".")
        shape = list(like.shape)
        if entry in _KV and x.ndim == 4:
            shape[2] = x.shape[2]
            lengths.setdefault(layer, set()).add(x.shape[2])
        # Half-precision entries of a Mac are float32 on a CPU; S is always float32.
        alike = entry != "fast_weights" and mx.issubdtype(like.dtype, mx.floating)
        fits = mx.issubdtype(x.dtype, mx.floating) if alike else x.dtype == like.dtype
        if list(x.shape) != shape or not fits:
            return f"{name!r} is {x.dtype} {list(x.shape)}, not {like.dtype} {shape}"
        if not mx.isfinite(x).all().item():
            return f"{name!r} has NaN or infinite values"
    for layer, found in lengths.items():
        if len(found) > 1 or mx.any(arrays[f"{layer}.offset"] < max(found)).item():
            return f"'{layer}' has a KV cache that no sleep leaves"
    return None
