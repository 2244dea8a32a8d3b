"""Models of mlx-lm, wrapped and not rewritten, so that they can sleep.

mlx-lm's own embedding, layers and head run over our states (`mlx_lm_cache`); parameters keep
mlx-lm's names, so that a folder is one of mlx-lm's too. `embed` is mlx-lm's decoder run with no
layers and no final norm, and `head` is mlx-lm's model run with its decoder replaced by the final
norm: multipliers, tied heads and logit scaling are then mlx-lm's business and not known here.

The architectures in TESTED are compared with PyTorch's, or where nobody has one with mlx-lm's own
under a naive sleep (`tests/parity/`). Another one is compared with mlx-lm's own forward pass, on a
few tokens, before its first use. `mlx_lm_details` adds what mlx-lm leaves out of some.
"""

from __future__ import annotations

import copy
import inspect

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from ..utils import schema
from ..utils.errors import UserError
from .base import LayerState, SleepConfig, SleepModel, State
from .mlx_lm_args import NOT_IN_OLD, OLD, ModelArgs, classes, untagged, without_nulls
from .mlx_lm_cache import LayerCache
from .mlx_lm_details import (
    group_norms,
    grouped_scores,
    set_latent_eps,
    tie_head,
    use_short_factors,
    windows,
)

__all__ = ["NOT_IN_OLD", "OLD", "TESTED", "Model", "ModelArgs", "untagged"]

TESTED = (
    "bailing_hybrid",
    "bailing_moe_linear",
    "falcon_h1",
    "gemma2",
    "gemma3_text",
    "granitemoehybrid",
    "kimi_linear",
    "llama",
    "mamba2",
    "mistral",
    "nemotron_h",
    "olmo_hybrid",
    "phi3",
    "plamo2",
    "qwen2",
    "qwen3",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "rwkv7",
    "smollm3",
)

# Recurrent layers that keep the right state for rows padded on the right, from `lengths`.
_READ_LENGTHS = (
    () if OLD else ("falcon_h1", "granitemoehybrid", "qwen3_5", "qwen3_5_moe", "qwen3_next")
)
# Tested layers that take no "causal" in place of an attention mask.
_TAKE_ARRAYS = ("bailing_hybrid", "gemma2", "kimi_linear")
_DECODERS = ("model", "backbone", "language_model.model", "transformer")
_NORMS = ("norm", "norm_f", "final_layernorm", "embedding_norm", "final_norm", "ln_f")
_MASKS = {"mask", "attn_mask", "mamba_mask"}
_CARRIED = "v_first"  # of RWKV-7: what its first layer hands to all others, beside h


class Model(SleepModel):
    """A model of mlx-lm as a SleepModel. Blocks are mlx-lm's layers.

    UserError where the architecture isn't built in the usual way: decoder, layers, final norm,
    and caches of KV or of recurrent arrays.
    """

    def __init__(self, args: ModelArgs):
        config = copy.deepcopy(args.config)  # mlx-lm's argument classes change it
        model_class, args_class = classes(config)
        config = without_nulls(args_class, config)
        schema.check_fields(args_class, config)
        try:
            inner = model_class(args_class.from_dict(config))
        except TypeError as error:
            raise UserError(f"mlx-lm cannot build this model: {error}") from error
        tie_head(inner, config)
        super().__init__(SleepConfig.from_dict(args.sleep), len(inner.layers))
        set_latent_eps(inner, config)
        group_norms(inner, config)
        use_short_factors(inner, config, self.sleep)
        self.args = args
        self.model_type = config["model_type"]
        object.__setattr__(self, "_inner", inner)  # hidden, so that parameters appear once
        for name, child in inner.items():
            self[name] = child
        self._is_tested = self._checked = self.model_type in TESTED
        try:
            self._learn_structure()
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"mlx-lm's {self.model_type} is built in a way that mlx-sleep does not know: "
                f"{' '.join(str(error).split())}"
            ) from error

    @property
    def inner(self) -> nn.Module:
        """mlx-lm's own model, of the same parameters: for mlx-lm's tools."""
        for name in list(self._inner):
            self._inner[name] = self[name]  # quantization replaces a layer at the top
        return self._inner

    @property
    def layers(self) -> list[nn.Module]:
        """mlx-lm's layers."""
        return self._inner.layers

    @property
    def block_modules(self) -> list[nn.Module]:
        return self.layers

    @property
    def has_fast_weights(self) -> bool:
        """Whether there is anything to sleep into."""
        return any("fast_weights" in c.recurrent.slots for c in self._caches if c.recurrent)

    def init_state(self, batch_size: int = 1) -> State:
        self._check()
        return super().init_state(batch_size)

    def embed(self, tokens):
        decoder = copy.copy(self._decoder())
        if isinstance(decoder.layers, nn.Module):  # a module of its own around the layers
            decoder.layers = copy.copy(decoder.layers)
            decoder.layers.layers = []
        else:
            decoder.layers = []
        setattr(decoder, self._norm, nn.Identity())
        h = decoder(tokens, cache=self._blank)
        return mx.concatenate([h, mx.zeros_like(h)], axis=-1) if self.carries else h

    def block(self, i, h, layer_state, mask=None):
        cache = self._caches[i]
        if mask is not None and cache.recurrent and not self._reads_lengths:
            return self._row_by_row(i, h, layer_state, mask)
        views = cache.views(layer_state, mask)
        h = self._call(i, h, layer_state, views, mask)
        entries = cache.entries(views)
        if self._counts(i):
            seen = h.shape[1] if mask is None else mask.sum(axis=1).astype(mx.int32)
            entries["offset"] = layer_state.get("offset", 0) + seen
        return h, entries

    def head(self, h):
        if self.carries:
            h = mx.split(h, 2, axis=-1)[0]
        top = owner = copy.copy(self.inner)
        *path, last = self._path
        for name in path:
            setattr(owner, name, copy.copy(getattr(owner, name)))
            owner = getattr(owner, name)
        setattr(owner, last, _OnlyNorm(getattr(owner, last), self._norm, h))
        return top(None)

    def _decoder(self) -> nn.Module:
        module = self
        for name in self._path:
            module = getattr(module, name)
        return module

    def _learn_structure(self) -> None:
        """Where decoder and norm are, what each layer takes and keeps; nothing is evaluated."""
        for path in _DECODERS:
            self._path = tuple(path.split("."))
            try:
                decoder = self._decoder()
            except AttributeError:
                continue
            if "layers" in decoder:
                break
        else:
            raise ValueError("no decoder with layers")
        norms = [name for name in _NORMS if name in decoder]
        if len(norms) != 1:
            raise ValueError("no single final norm")
        self._norm = norms[0]
        # Never written to: `embed` runs no layer.
        self._blank = tuple(make_prompt_cache(self._inner))
        self._caches = _layer_caches(self.layers, self._blank, windows(self.args.config))
        self._reads_lengths = self.model_type in _READ_LENGTHS
        self.carries = _CARRIED in inspect.signature(type(self.layers[0]).__call__).parameters
        self._takes_arrays = not self._is_tested or self.model_type in _TAKE_ARRAYS
        self._takes = tuple(_masks_of(layer) for layer in self.layers)
        h = self.embed(mx.zeros((1, 1), mx.int32))
        for i, cache in enumerate(self._caches):
            views = cache.views({})
            h = self._call(i, h, {}, views, None)
            cache.learn(views)

    def _call(self, i, h, layer_state: LayerState, views, mask):
        """mlx-lm's layer i with the masks that it expects."""
        cache = self._caches[i]
        kv, masks = cache.kv, {}
        sliding = self.sleep.window if self.sleep.eviction == "sliding" else None
        for name in self._takes[i]:
            if name == "offset":
                masks[name] = layer_state.get("offset", 0)
                continue
            attends = kv and name == "attn_mask" or kv and name == "mask" and not cache.recurrent
            if attends:
                sees = kv.mask(layer_state, h, mask, sliding, arrays=self._takes_arrays)
                if getattr(sees, "ndim", 0) == 4 and grouped_scores(self.layers[i]):
                    sees = sees[:, :, None]
                masks[name] = sees
            else:
                masks[name] = mask
        argument = cache.argument(views)
        if self.carries:
            h, carried = mx.split(h, 2, axis=-1)
            heads = (*h.shape[:2], -1, self.layers[i].attn.head_dim)
            h, carried = self.layers[i](h, carried.reshape(heads), argument)
            return mx.concatenate([h, carried.reshape(h.shape)], axis=-1)
        # S in float32 makes all of it float32 in some layers.
        return self.layers[i](h, cache=argument, **masks).astype(h.dtype)

    def _counts(self, i: int) -> bool:
        """Whether layer i needs the number of tokens seen, and keeps no KV that would tell it."""
        return "offset" in self._takes[i] and not self._caches[i].kv

    def _row_by_row(self, i, h, layer_state: LayerState, mask):
        """Padded rows one by one without their padding, for layers that would fold it in."""
        if self._caches[i].kv:
            raise UserError(f"mlx-lm's {self.model_type} can't run padded batches; run rows alone")
        T, rows, states = h.shape[1], [], []
        for row, length in enumerate(mask.sum(axis=1).tolist()):
            one: LayerState = {
                n: x if isinstance(x, int) else x[row : row + 1] for n, x in layer_state.items()
            }
            x = h[row : row + 1]
            if length:
                x, one = self.block(i, x[:, :length], one)
                x = mx.pad(x, [(0, 0), (0, T - length), (0, 0)])
            rows.append(x)
            if "offset" in one:
                one["offset"] = mx.array(one["offset"], mx.int32).reshape(1)
            states.append(one)
        shapes = max(states, key=len)
        for one in states:  # a row without tokens may lack arrays yet
            for name, x in shapes.items():
                one.setdefault(name, mx.zeros_like(x))
        state = {name: mx.concatenate([s[name] for s in states]) for name in shapes}
        return mx.concatenate(rows), state

    def _check(self) -> None:
        """Once, for architectures not in TESTED: the wrapped forward pass is mlx-lm's own."""
        if self._checked:
            return
        prompt, step = mx.arange(3)[None], mx.array([[3]])
        cache = make_prompt_cache(self.inner)
        state: State | None = [{} for _ in range(self.num_layers)]
        try:
            same = True
            for tokens in (prompt, step):
                theirs = self._inner(tokens, cache=cache)
                ours, state = self(tokens, state)
                rounding = 1e-4 if ours.dtype == mx.float32 else 0.05
                same &= bool(mx.abs(ours - theirs).max() <= rounding * mx.abs(theirs).max())
        except (AttributeError, TypeError, ValueError):
            same = False
        if not same:
            raise UserError(
                f"mlx-lm's {self.model_type} computes something that mlx-sleep does not know of; "
                "use it with mlx-lm"
            )
        self._checked = True


class _OnlyNorm:
    """In place of a decoder whose layers have run already, with h after them."""

    def __init__(self, decoder: nn.Module, norm: str, h):
        self._decoder, self._norm, self._h = decoder, norm, h

    def __call__(self, *args, **kwargs):
        return self._decoder[self._norm](self._h)

    def __getattr__(self, name):
        return getattr(self._decoder, name)


def _layer_caches(layers, caches, limits: list[int | None]) -> tuple[LayerCache, ...]:
    """One for each layer. Nemotron-H makes caches for its mixers alone."""
    if len(caches) != len(layers):
        mixers = [getattr(layer, "block_type", None) in ("M", "*") for layer in layers]
        if sum(mixers) != len(caches):
            raise ValueError(f"{len(caches)} caches for {len(layers)} layers")
        rest = iter(caches)
        caches = [next(rest) if mixer else None for mixer in mixers]
    found = tuple(LayerCache(cache) for cache in caches)
    for cache, limit in zip(found, limits, strict=False):
        if cache.kv and limit is not None:
            cache.kv.sliding = limit
    return found


def _masks_of(layer: nn.Module) -> list[str]:
    """The names of the masks that a layer takes. ValueError when it needs anything else."""
    _, *parameters = inspect.signature(type(layer).__call__).parameters.values()
    _, *parameters = parameters  # h
    needed = [p.name for p in parameters if p.default is p.empty]
    if unknown := set(needed) - _MASKS - {"cache", _CARRIED}:
        raise ValueError(f"a layer needs {', '.join(sorted(unknown))}")
    return [p.name for p in parameters if p.name in _MASKS or p.name == "offset"]
