"""Jet-Nemotron and Algorithm 1 in PyTorch, for comparison only.

The published modelling code needs Triton and a GPU, so this is written from its facts (parameter
names, layer order, activations; arXiv 2508.15884), without padding, a fast path, or a line in
common with mlx_sleep.models. The recurrence itself is transformers' own. It was compared once, in
November 2026, with the published code, run on a CPU with plain PyTorch in place of its Triton
kernels: the same names and shapes, also at full size, and logits within 6e-6.

A state is one dict for each layer, a value that is never changed: S [B, H, Dv, Dk] and conv
[B, K-1, C] of a JetBlock; k, v [B, Hkv, S, d] with RoPE, and seen, of attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from .layers import GatedMLP, RMSNorm


class DynamicShortConvolution(nn.Module):
    def __init__(self, channels, kernel, inputs, reduction):
        super().__init__()
        self.kernel = kernel
        inner = channels // reduction
        generator = {
            "w1": nn.Linear(inputs, inner, bias=False),
            "act": nn.SiLU(),
            "w2": nn.Linear(inner, channels * kernel),
        }
        self.kernel_generator = nn.Sequential()
        for name, layer in generator.items():
            self.kernel_generator.add_module(name, layer)

    def forward(self, v, x, conv):
        """v [B, T, C], x [B, T, D] -> silu of the convolution [B, T, C], and the last inputs."""
        taps = self.kernel_generator(x).unflatten(-1, (v.shape[-1], self.kernel))
        inputs = torch.cat([conv, v], dim=1)
        windows = inputs.unfold(1, self.kernel, 1)  # [B, T, C, K], the newest input last
        return F.silu((windows * taps).sum(-1)), inputs[:, v.shape[1] :]


class JetBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        jet, D = config["efficient_attention_config"]["jet"], config["hidden_size"]
        self.H, self.Dk = jet["num_heads"], jet["head_dim"]
        self.Dv = int(self.Dk * jet["expand_v"])
        keys, self.values = self.H * self.Dk, self.H * self.Dv
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, self.values, bias=False)
        self.b_proj = nn.Linear(D, self.H, bias=False)
        self.a_proj = nn.Linear(D, self.H, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.H))
        self.dt_bias = nn.Parameter(torch.empty(self.H))
        self.dynamic_conv1d = DynamicShortConvolution(
            self.values, jet["conv_size"], D, jet["dconv_generator_reduction"]
        )
        self.g_proj = nn.Linear(D, self.values, bias=False)
        self.o_norm = RMSNorm(self.Dv, float(jet["norm_eps"]))
        self.o_proj = nn.Linear(self.values, D, bias=False)

    def forward(self, x, state, window):
        q, k = (F.silu(f(x)).unflatten(-1, (self.H, self.Dk)) for f in (self.q_proj, self.k_proj))
        conv = state.get("conv")
        if conv is None:
            conv = x.new_zeros(len(x), self.dynamic_conv1d.kernel - 1, self.values)
        v, conv = self.dynamic_conv1d(self.v_proj(x), x, conv)
        S = state.get("S")
        o, S = torch_recurrent_gated_delta_rule(
            q,
            k,
            v.unflatten(-1, (self.H, self.Dv)),
            g=-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias),
            beta=self.b_proj(x).sigmoid(),
            initial_state=None if S is None else S.mT.clone(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        o = self.o_norm(o) * F.silu(self.g_proj(x).unflatten(-1, (self.H, self.Dv)))
        return self.o_proj(o.flatten(-2)), {"S": S.mT, "conv": conv}


class Attention(nn.Module):
    def __init__(self, config, window):
        super().__init__()
        D, self.H, self.Hkv = (
            config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        self.d, self.window = config.get("head_dim") or D // self.H, window
        self.theta = config["rope_theta"]
        self.q_proj = nn.Linear(D, self.H * self.d)
        self.k_proj = nn.Linear(D, self.Hkv * self.d)
        self.v_proj = nn.Linear(D, self.Hkv * self.d)
        self.o_proj = nn.Linear(self.H * self.d, D, bias=False)

    def rope(self, x, positions):
        """x [B, H, T, d] turned by its positions [T], in halves."""
        half = self.d // 2
        angle = positions[:, None] * self.theta ** (-torch.arange(half, dtype=x.dtype) / half)
        a, b = x.split(half, dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x, state, window):
        T, seen = x.shape[1], state.get("seen", 0)
        q = self.q_proj(x).unflatten(-1, (self.H, self.d)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (self.Hkv, self.d)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.Hkv, self.d)).transpose(1, 2)
        positions = torch.arange(seen, seen + T)
        q, k = self.rope(q, positions), self.rope(k, positions)
        if "k" in state:
            k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        ago = positions[:, None] - torch.arange(seen + T - k.shape[2], seen + T)
        sees = (ago >= 0) & (ago < min(w for w in (self.window, window, seen + T) if w))
        groups = self.H // self.Hkv
        scores = q @ k.repeat_interleave(groups, 1).transpose(-1, -2) * self.d**-0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        o = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2).flatten(-2)
        return self.o_proj(o), {"k": k, "v": v, "seen": seen + T}


class Layer(nn.Module):
    def __init__(self, config, kind):
        super().__init__()
        if kind == "jet":
            self.self_attn = JetBlock(config)
        else:
            swa = config["efficient_attention_config"].get("swa", {})
            self.self_attn = Attention(config, swa["window_size"] if kind == "swa" else None)
        self.mlp = GatedMLP(config["hidden_size"], config["intermediate_size"])
        self.input_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])

    def forward(self, h, state, window):
        o, state = self.self_attn(self.input_layernorm(h), state, window)
        h = h + o
        return h + self.mlp(self.post_attention_layernorm(h)), state


class Decoder(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config["layer_types"])
        self.norm = RMSNorm(config["hidden_size"], config["rms_norm_eps"])


class JetNemotron(nn.Module):
    """config as published; sleep: window, eviction, loop_range, as in the field of our config."""

    def __init__(self, config: dict, sleep: dict | None = None):
        super().__init__()
        sleep = sleep or {}
        self.sliding = sleep.get("eviction") == "sliding"
        self.window = sleep["window"] if self.sliding else None
        self.loop = sleep.get("loop_range") or (0, len(config["layer_types"]))
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config["tie_word_embeddings"]:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens, state=None):
        """tokens [B, T] -> (logits [B, T, vocab], state)."""
        h, state = self.model.embed_tokens(tokens), list(state or self.fresh())
        for i, layer in enumerate(self.model.layers):
            h, state[i] = layer(h, state[i], self.window)
        return self.lm_head(self.model.norm(h)), state

    def fresh(self):
        return [{} for _ in self.model.layers]

    def consolidate(self, tokens, start, passes):
        """Algorithm 1 of arXiv 2605.26099 over one window: the state that crosses the boundary."""
        state = list(start)
        lo, hi = self.loop
        order = [*range(lo), *list(range(lo, hi)) * passes, *range(hi, len(state))]
        h = self.model.embed_tokens(tokens)
        for i in order:
            # Only S runs on from pass to pass; KV and convolution begin where the window began.
            now = {**start[i], "S": state[i]["S"]} if "S" in state[i] else start[i]
            h, state[i] = self.model.layers[i](h, now, self.window)
        return self.evict(state)

    def evict(self, state):
        """What crosses the boundary between two windows."""
        if not self.sliding:
            return [{"S": layer["S"]} if "S" in layer else {} for layer in state]
        newest = slice(-(self.window - 1), None)
        return [
            {**layer, "k": layer["k"][:, :, newest], "v": layer["v"][:, :, newest]}
            if "k" in layer
            else layer
            for layer in state
        ]


def randomize(model: nn.Module) -> None:
    """Weights at which gates, taps and norms all matter, and rounding is not blown up by depth."""
    for name, p in model.named_parameters():
        kind = name.split(".")[-2:]
        with torch.no_grad():
            if kind[-1] == "A_log":
                p.uniform_(-2, 2)
            elif "norm" in kind[0]:
                p.normal_(1, 0.2)
            elif p.ndim == 1:
                p.normal_(0, 0.5)
            else:
                p.normal_(0, p.shape[-1] ** -0.5)
