"""sleep_hybrid in PyTorch: what a checkpoint for this project looks like, and how it sleeps.

This file needs nothing but PyTorch; copy it to where you train. It is the definition that
mlx-sleep is compared with, written to be read and not to be fast: the recurrences are loops over
tokens. `SleepHybrid.state_dict()` as safetensors, with config.json beside it, is what
`mlx-sleep convert` takes. examples/train_in_pytorch.py trains one.

A state is a list with a dict for each block: S [B, H, Dv, Dk] and conv [B, K-1, C] of an SSM
block; k, v [B, Hkv, S, d] and seen of an attention block. {} is the state of a fresh block.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

DEFAULTS = {
    "num_attention_heads": 4,
    "qk_norm": True,
    "rope_theta": 10_000.0,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "mamba_num_heads": 4,
    "mamba_head_dim": 64,
    "mamba_n_groups": 1,
    "ssm_state_size": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def rope(x, seen, theta):
    """Rotate x [B, H, T, d], the tokens after `seen` others: pairs (i, i + d/2)."""
    half = x.shape[-1] // 2
    at = torch.arange(seen, seen + x.shape[2], dtype=x.dtype)
    angle = at[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def short_conv(x, weight, before):
    """Causal depthwise convolution of x [B, T, C]; weight [C, K]. before: the last K-1 inputs."""
    K = weight.shape[1]
    if before is None:
        before = x.new_zeros(x.shape[0], K - 1, x.shape[2])
    x = torch.cat([before, x], 1)
    y = F.conv1d(x.mT, weight[:, None], groups=x.shape[2]).mT
    return y, x[:, x.shape[1] - (K - 1) :]


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.H, self.theta = c["num_attention_heads"], c["rope_theta"]
        self.Hkv = c.get("num_key_value_heads") or self.H
        D, d = c["hidden_size"], c.get("head_dim") or c["hidden_size"] // self.H
        self.q_proj = nn.Linear(D, self.H * d, bias=False)
        self.k_proj = nn.Linear(D, self.Hkv * d, bias=False)
        self.v_proj = nn.Linear(D, self.Hkv * d, bias=False)
        self.o_proj = nn.Linear(self.H * d, D, bias=False)
        if c["qk_norm"]:
            self.q_norm = nn.RMSNorm(d, eps=c["rms_norm_eps"])
            self.k_norm = nn.RMSNorm(d, eps=c["rms_norm_eps"])

    def forward(self, x, state, sliding):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.H, -1)
        k = self.k_proj(x).view(B, T, self.Hkv, -1)
        v = self.v_proj(x).view(B, T, self.Hkv, -1).transpose(1, 2)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        seen = state.get("seen", 0)
        q, k = (rope(a.transpose(1, 2), seen, self.theta) for a in (q, k))
        if "k" in state:
            k, v = torch.cat([state["k"], k], 2), torch.cat([state["v"], v], 2)
        query = torch.arange(k.shape[2] - T, k.shape[2])[:, None]
        key = torch.arange(k.shape[2])
        sees = key <= query
        if sliding:
            sees &= key > query - sliding
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
        o = self.o_proj(o.transpose(1, 2).reshape(B, T, -1))
        return o, {"k": k, "v": v, "seen": seen + T}


class GatedDeltaNet(nn.Module):
    """S <- a S (I - b k k^T) + b v k^T, o = S q; q, k, v after a short convolution."""

    def __init__(self, c):
        super().__init__()
        D = c["hidden_size"]
        self.Hk, self.Hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
        self.Dk, self.Dv = c["linear_key_head_dim"], c["linear_value_head_dim"]
        channels = 2 * self.Hk * self.Dk + self.Hv * self.Dv
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, self.Hv * self.Dv, bias=False)
        self.in_proj_ba = nn.Linear(D, 2 * self.Hv, bias=False)
        self.conv_weight = nn.Parameter(_conv_init(channels, c["linear_conv_kernel_dim"]))
        self.A_log, self.dt_bias = _decay_init(self.Hv)
        self.norm = nn.RMSNorm(self.Dv, eps=c["rms_norm_eps"])
        self.out_proj = nn.Linear(self.Hv * self.Dv, D, bias=False)

    def forward(self, x, state, sliding):
        B, T, _ = x.shape
        qkv, conv = short_conv(self.in_proj_qkv(x), self.conv_weight, state.get("conv"))
        sizes = [self.Hk * self.Dk, self.Hk * self.Dk, self.Hv * self.Dv]
        q, k, v = F.silu(qkv).split(sizes, -1)
        q, k = (unit(a.view(B, T, self.Hk, self.Dk)) for a in (q, k))
        q, k = (a.repeat_interleave(self.Hv // self.Hk, 2) for a in (q, k))
        v = v.view(B, T, self.Hv, self.Dv)
        b, dt = self.in_proj_ba(x).chunk(2, -1)
        beta = b.sigmoid()[..., None]
        alpha = torch.exp(-self.A_log.exp() * F.softplus(dt + self.dt_bias))[..., None, None]
        S = state.get("S", x.new_zeros(B, self.Hv, self.Dv, self.Dk))
        outputs = []
        for t in range(T):
            S = alpha[:, t] * S
            change = beta[:, t] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t]))
            S = S + change[..., None] * k[:, t, :, None]
            outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t] * self.Dk**-0.5))
        z = self.in_proj_z(x).view(B, T, self.Hv, self.Dv)
        o = self.norm(torch.stack(outputs, 1)) * F.silu(z)
        return self.out_proj(o.reshape(B, T, -1)), {"S": S, "conv": conv}


class Mamba2(nn.Module):
    """S <- a S + dt v k^T, o = S q + D v: eq. 3 of the paper."""

    def __init__(self, c):
        super().__init__()
        self.H, self.P = c["mamba_num_heads"], c["mamba_head_dim"]
        self.G, self.N = c["mamba_n_groups"], c["ssm_state_size"]
        D, inner = c["hidden_size"], self.H * self.P
        channels = inner + 2 * self.G * self.N
        self.in_proj = nn.Linear(D, inner + channels + self.H, bias=False)
        self.conv_weight = nn.Parameter(_conv_init(channels, c["linear_conv_kernel_dim"]))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.A_log, self.dt_bias = _decay_init(self.H)
        self.D = nn.Parameter(torch.ones(self.H))
        self.norm = nn.RMSNorm(inner, eps=c["rms_norm_eps"])
        self.out_proj = nn.Linear(inner, D, bias=False)

    def forward(self, x, state, sliding):
        B, T, _ = x.shape
        inner, groups = self.H * self.P, self.G * self.N
        z, vkq, dt = self.in_proj(x).split([inner, inner + 2 * groups, self.H], -1)
        vkq, conv = short_conv(vkq, self.conv_weight, state.get("conv"))
        v, k, q = F.silu(vkq + self.conv_bias).split([inner, groups, groups], -1)
        v = v.view(B, T, self.H, self.P)
        q, k = (a.view(B, T, self.G, self.N).repeat_interleave(self.H // self.G, 2) for a in (q, k))
        dt = F.softplus(dt + self.dt_bias)
        alpha = torch.exp(-self.A_log.exp() * dt)[..., None, None]
        S = state.get("S", x.new_zeros(B, self.H, self.P, self.N))
        outputs = []
        for t in range(T):
            S = alpha[:, t] * S + (dt[:, t, :, None] * v[:, t])[..., None] * k[:, t, :, None]
            outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
        o = (torch.stack(outputs, 1) + self.D[:, None] * v).reshape(B, T, -1)
        return self.out_proj(self.norm(o * F.silu(z))), {"S": S, "conv": conv}


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, inner = c["hidden_size"], c["intermediate_size"]
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)
        self.act = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}[c["hidden_act"]]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c, kind):
        super().__init__()
        mixers = {"attention": Attention, "gated_deltanet": GatedDeltaNet, "mamba2": Mamba2}
        self.mixer = mixers[kind](c)
        self.mixer_norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp_norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.mlp = MLP(c)

    def forward(self, h, state, sliding):
        out, state = self.mixer(self.mixer_norm(h), state, sliding)
        h = h + out
        return h + self.mlp(self.mlp_norm(h)), state


class SleepHybrid(nn.Module):
    """config: the contents of config.json, `sleep` included."""

    def __init__(self, config):
        super().__init__()
        c = {**DEFAULTS, **config}
        self.sleep = {"passes": 1, "window": 256, "eviction": "hard", **c.get("sleep", {})}
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Block(c, kind) for kind in c["layer_types"])
        self.norm = nn.RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)
        if c["tie_word_embeddings"]:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def sliding(self):
        return self.sleep["window"] if self.sleep["eviction"] == "sliding" else None

    def fresh(self):
        """The state of a model that has seen nothing."""
        return [{} for _ in self.layers]

    def forward(self, tokens, state):
        """One ordinary pass over tokens [B, T]: (logits, state). This is all that wake does."""
        h, state = self.embed_tokens(tokens), list(state)
        for i, block in enumerate(self.layers):
            h, state[i] = block(h, state[i], self.sliding)
        return self.lm_head(self.norm(h)), state

    def consolidate(self, tokens, state, passes=None):
        """A sleep over one window (arXiv 2605.26099, Algorithm 1): the state that outlives it.

        h runs on from pass to pass; S is never reset; KV and convolution begin in each pass where
        the window began.
        """
        lo, hi = self.sleep.get("loop_range") or (0, len(self.layers))
        passes = passes or self.sleep["passes"]
        order = [*range(lo), *list(range(lo, hi)) * passes, *range(hi, len(self.layers))]
        start, state = state, list(state)
        h = self.embed_tokens(tokens)
        for i in order:
            before = {**start[i], "S": state[i]["S"]} if "S" in state[i] else start[i]
            h, state[i] = self.layers[i](h, before, self.sliding)
        return self.evict(state)

    def evict(self, state):
        """What crosses the boundary between two windows."""
        if not self.sliding:
            return [{"S": layer["S"]} if "S" in layer else {} for layer in state]
        keep = self.sliding - 1
        return [
            {**layer, "k": layer["k"][:, :, -keep:], "v": layer["v"][:, :, -keep:]}
            if "k" in layer
            else layer
            for layer in state
        ]


def unit(x, eps=1e-6):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + eps)


def _conv_init(channels, kernel):
    return torch.empty(channels, kernel).uniform_(-(kernel**-0.5), kernel**-0.5)


def _decay_init(heads):
    """A head forgets over 10 to 1000 tokens at first, as in Mamba-2."""
    dt = torch.exp(torch.empty(heads).uniform_(-6.9, -2.3))
    A = torch.empty(heads).uniform_(1, 16)
    return nn.Parameter(A.log()), nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
