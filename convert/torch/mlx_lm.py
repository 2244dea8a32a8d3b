"""Algorithm 1 over a model of transformers, whose own code runs unchanged.

A pass is the model's decoder called on h in place of embeddings, its final norm left out: pass
j + 1 reads the h that pass j wrote. S goes in and out through transformers' cache. With a sliding
eviction tokens run one by one over a cache that is cut to the newest L - 1 entries each time.
Nothing pads: a padded row is compared with the row alone.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

# The families that keep S as [B, H, Dk, Dv].
_DELTA = (
    "bailing_hybrid",
    "kimi_linear",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)


class State(list):
    """For each layer a dict of tensors S [B, H, Dv, Dk], conv, keys and values; absent is empty."""

    seen: int = 0


class Reference:
    """A model of transformers that can sleep. sleep: window and eviction, as in SleepConfig."""

    def __init__(self, config: dict, sleep: dict):
        fields = {name: value for name, value in config.items() if name != "model_type"}
        self.config = AutoConfig.for_model(config["model_type"], **fields)
        self.net = AutoModelForCausalLM.from_config(
            self.config,
            attn_implementation="eager",  # sdpa has no softcapping
        ).eval()
        self.transposed = config["model_type"] in _DELTA
        self.keep = sleep["window"] - 1 if sleep.get("eviction") == "sliding" else None

    def fresh(self) -> State:
        return State({} for _ in range(self.config.num_hidden_layers))

    @torch.no_grad()
    def forward(self, tokens, state: State):
        """One ordinary pass of the whole model: (logits [B, T, vocab], state)."""
        run = lambda ids, **more: self.net(input_ids=ids, **more).logits  # noqa: E731
        return self._over(run, torch.as_tensor(tokens), state)

    @torch.no_grad()
    def consolidate(self, tokens, start: State, passes: int) -> State:
        """Algorithm 1's consolidation of one window, and the eviction after it."""
        decoder = self.net.model
        h = decoder.get_input_embeddings()(torch.as_tensor(tokens))
        h = h * getattr(decoder, "embedding_multiplier", 1.0)
        state = start
        for _ in range(passes):
            state = _copy(start, (_with_S(a, b) for a, b in zip(start, state, strict=True)))
            with _blocks_only(decoder):
                h, state = self._over(_decode(decoder), h, state)
        if self.keep is None:
            return State(_with_S({}, layer) for layer in state)
        return self._cut(state)

    def _over(self, run, inputs, state: State):
        """run on inputs [B, T, ...]: whole, or one by one where the window slides."""
        parts = [inputs] if self.keep is None else inputs.split(1, dim=1)
        out = []
        for part in parts:
            cache = self._cache(state)
            at = torch.arange(state.seen, state.seen + part.shape[1])[None]
            out.append(run(part, past_key_values=cache, position_ids=at, use_cache=True))
            seen, state = state.seen + part.shape[1], self._state(cache)
            state.seen = seen
            state = self._cut(state)
        return torch.cat(out, dim=1), state

    def _cut(self, state: State) -> State:
        if self.keep is None:
            return state
        kv = ("keys", "values")
        return _copy(
            state,
            ({n: x[:, :, -self.keep :] if n in kv else x for n, x in s.items()} for s in state),
        )

    def _cache(self, state: State) -> DynamicCache:
        """transformers' cache with the contents of a state. It writes in place, so on copies."""
        cache = DynamicCache(config=self.config)
        for layer, kept in zip(cache.layers, state, strict=True):
            if "keys" in kept:
                layer.update(kept["keys"].clone(), kept["values"].clone())
            if "conv" in kept:
                layer.update_conv_state(kept["conv"].clone())
            if "S" in kept:
                layer.update_recurrent_state(self._layout(kept["S"]).clone())
        return cache

    def _state(self, cache: DynamicCache) -> State:
        state = State()
        for layer in cache.layers:
            kept: dict[str, torch.Tensor] = {}
            if getattr(layer, "keys", None) is not None:
                kept.update(keys=layer.keys, values=layer.values)
            if getattr(layer, "recurrent_states", {}).get(0) is not None:
                kept["S"] = self._layout(layer.recurrent_states[0])
                kept["conv"] = layer.conv_states[0]
            state.append(kept)
        return state

    def _layout(self, S):
        return S.transpose(-1, -2) if self.transposed else S


def _with_S(start: dict, state: dict) -> dict:
    """A layer as it was at the start of a window, with the S of now."""
    if "S" not in state:
        return start
    # transformers' cache gives S back only where it has a left context too: zeros are none.
    return {"conv": torch.zeros_like(state["conv"]), **start, "S": state["S"]}


def _copy(state: State, layers) -> State:
    copied = State(layers)
    copied.seen = state.seen
    return copied


def _decode(decoder):
    return lambda h, **more: decoder(inputs_embeds=h, **more).last_hidden_state


@contextlib.contextmanager
def _blocks_only(decoder):
    """The decoder without its final norm and without a multiplier of its inputs."""
    name = next(n for n in ("norm", "norm_f", "final_layernorm") if hasattr(decoder, n))
    norm, multiplier = getattr(decoder, name), getattr(decoder, "embedding_multiplier", None)
    setattr(decoder, name, nn.Identity())
    if multiplier is not None:
        decoder.embedding_multiplier = 1.0
    try:
        yield
    finally:
        setattr(decoder, name, norm)
        if multiplier is not None:
            decoder.embedding_multiplier = multiplier
