"""fla's GatedDeltaNetForCausalLM and Mamba2ForCausalLM in plain PyTorch, and Algorithm 1 on them.

fla's layers need Triton and a GPU, so their definitions (flash-linear-attention 0.6.0) are written
out here once more: parameters named and shaped as in its checkpoints, the recurrences one token
after the other, float32. It is a reference to compare with, not a model to use. Nothing pads: a
padded row is compared with the row alone.

It was compared once with fla's own classes on a CPU, their kernels replaced by fla's naive
operations and PyTorch's: equal state dicts, logits within 5e-5 (both models, Mamba-2 without
attention). Where 1 < n_groups < heads, the heads of a Mamba-2 group stand side by side, as on
fla's CUDA path, in its decoding and in transformers; its prefill on a CPU alone orders them
otherwise.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .layers import GatedMLP


def rms(x, weight, eps, groups=1):
    grouped = x.unflatten(-1, (groups, -1))
    grouped = grouped / (grouped.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return grouped.flatten(-2) * weight


def swish(x):
    return x / (1 + torch.exp(-x))


def powlu(x):
    out = torch.sigmoid(x) * x
    up = x > 0
    out[up] = torch.sigmoid(x[up]) * x[up] ** (3 / (x[up].sqrt() + 1))
    return out


class Scale(nn.Module):
    """The weight of a norm."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


def conv_module(channels, kernel, bias):
    return nn.Conv1d(channels, channels, kernel, groups=channels, bias=bias)


def convolved(conv, x, before):
    """(swish of the causal convolution of x [B, T, C], its last K - 1 inputs)"""
    kernel = conv.kernel_size[0]
    if before is None:
        before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2])
    x = torch.cat([before, x], dim=1)
    return swish(conv(x.mT).mT), x[:, x.shape[1] - (kernel - 1) :]


class Attention(nn.Module):
    def __init__(self, hidden, spec, window):
        super().__init__()
        self.heads = spec["num_heads"]
        self.kv_heads = spec.get("num_kv_heads") or self.heads
        self.dim = hidden // self.heads
        self.theta = spec.get("rope_theta", 10000.0)
        self.window = min(w or 10**9 for w in (spec.get("window_size"), window))
        bias = spec.get("qkv_bias", False)
        self.q_proj = nn.Linear(hidden, hidden, bias=bias)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=bias)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        if spec.get("qk_norm"):
            self.q_norm, self.k_norm = Scale(self.dim), Scale(self.dim)

    def rotated(self, x, position):
        half = self.dim // 2
        angle = position * self.theta ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x, state):
        seen, keys, values = state.get("seen", 0), state.get("keys", []), state.get("values", [])
        out = []
        for t in range(x.shape[1]):
            q = self.q_proj(x[:, t]).unflatten(-1, (self.heads, -1))
            k = self.k_proj(x[:, t]).unflatten(-1, (self.kv_heads, -1))
            v = self.v_proj(x[:, t]).unflatten(-1, (self.kv_heads, -1))
            if hasattr(self, "q_norm"):
                q, k = rms(q, self.q_norm.weight, 1e-5), rms(k, self.k_norm.weight, 1e-5)
            q, k = self.rotated(q, seen + t), self.rotated(k, seen + t)
            keys, values = [*keys, k], [*values, v]
            shared = self.heads // self.kv_heads
            sees = [torch.stack(a[-self.window :], 2) for a in (keys, values)]  # [B, Hkv, S, d]
            ks, vs = (a.repeat_interleave(shared, dim=1) for a in sees)
            score = (ks @ q[..., None])[..., 0] / self.dim**0.5
            out.append((score.softmax(-1)[..., None, :] @ vs)[..., 0, :].flatten(1))
        grown = {"seen": seen + x.shape[1], "keys": keys, "values": values}
        return self.o_proj(torch.stack(out, 1)), grown


class GatedDeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden, self.H = c["hidden_size"], c["num_heads"]
        self.Hv = c.get("num_v_heads") or self.H
        self.Dk, self.Dv = c["head_dim"], int(c["head_dim"] * c.get("expand_v", 2.0))
        self.eps, self.strength = c["norm_eps"], 2 if c.get("allow_neg_eigval") else 1
        keys, values = self.H * self.Dk, self.Hv * self.Dv
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.a_proj = nn.Linear(hidden, self.Hv, bias=False)
        self.b_proj = nn.Linear(hidden, self.Hv, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.Hv))
        self.dt_bias = nn.Parameter(torch.zeros(self.Hv))
        if c.get("use_short_conv", True):
            kernel, bias = c.get("conv_size", 4), c.get("conv_bias", False)
            self.q_conv1d = conv_module(keys, kernel, bias)
            self.k_conv1d = conv_module(keys, kernel, bias)
            self.v_conv1d = conv_module(values, kernel, bias)
        if c.get("use_gate", True):
            self.g_proj = nn.Linear(hidden, values, bias=False)
            self.act = torch.sigmoid if c.get("output_gate_activation") == "sigmoid" else swish
        self.o_norm = Scale(self.Dv)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def forward(self, x, state):
        conv = {}
        qkv = {n: getattr(self, f"{n}_proj")(x) for n in "qkv"}
        for n in qkv:
            if hasattr(self, "q_conv1d"):
                before = state.get("conv", {}).get(n)
                qkv[n], conv[n] = convolved(getattr(self, f"{n}_conv1d"), qkv[n], before)
            else:
                qkv[n] = swish(qkv[n])
        sizes = {"q": self.Dk, "k": self.Dk, "v": self.Dv}
        q, k, v = (qkv[n].unflatten(-1, (-1, size)) for n, size in sizes.items())
        q, k = (a / (a.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for a in (q, k))
        q, k = (a.repeat_interleave(self.Hv // self.H, dim=2) for a in (q, k))
        beta = self.strength * torch.sigmoid(self.b_proj(x))
        decay = torch.exp(-self.A_log.exp() * F.softplus(self.a_proj(x) + self.dt_bias))
        S = state.get("S", x.new_zeros(x.shape[0], self.Hv, self.Dv, self.Dk))
        out = []
        for t in range(x.shape[1]):
            S = decay[:, t, :, None, None] * S
            held = torch.einsum("bhvk,bhk->bhv", S, k[:, t])
            new = beta[:, t, :, None] * (v[:, t] - held)
            S = S + torch.einsum("bhv,bhk->bhvk", new, k[:, t])
            out.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]) / self.Dk**0.5)
        o = rms(torch.stack(out, 1), self.o_norm.weight, self.eps)
        if hasattr(self, "g_proj"):
            o = o * self.act(self.g_proj(x)).view_as(o)
        return self.o_proj(o.flatten(2)), {"S": S, "conv": conv}


class Mamba2(nn.Module):
    def __init__(self, c):
        super().__init__()
        hidden = c["hidden_size"]
        self.inner, self.P = int(c.get("expand", 2) * hidden), c["head_dim"]
        self.H, self.G, self.N = self.inner // self.P, c.get("n_groups", 1), c["state_size"]
        self.eps, self.before = c["norm_eps"], c.get("norm_before_gate", False)
        self.low, self.high = c.get("dt_limit", (0.0, float("inf")))
        self.channels = self.inner + 2 * self.G * self.N
        bias = c.get("use_bias", False)
        self.in_proj = nn.Linear(hidden, self.inner + self.channels + self.H, bias=bias)
        self.conv1d = conv_module(self.channels, c.get("conv_kernel", 4), c["use_conv_bias"])
        self.dt_bias = nn.Parameter(torch.zeros(self.H))
        self.A_log = nn.Parameter(torch.zeros(self.H))
        self.D = nn.Parameter(torch.ones(self.inner if c.get("D_has_hdim") else self.H))
        if c.get("rmsnorm", True):
            self.norm = Scale(self.inner)
        self.out_proj = nn.Linear(self.inner, hidden, bias=bias)

    def forward(self, x, state):
        z, xBC, dt = self.in_proj(x).split([self.inner, self.channels, self.H], dim=-1)
        xBC, conv = convolved(self.conv1d, xBC, state.get("conv"))
        u, Bs, Cs = xBC.split([self.inner, self.G * self.N, self.G * self.N], dim=-1)
        u = u.unflatten(-1, (self.H, self.P))
        Bs, Cs = (
            a.unflatten(-1, (self.G, self.N)).repeat_interleave(self.H // self.G, dim=2)
            for a in (Bs, Cs)
        )
        dt = F.softplus(dt + self.dt_bias).clamp(self.low, self.high)
        decay = torch.exp(-self.A_log.exp() * dt)
        S = state.get("S", x.new_zeros(x.shape[0], self.H, self.P, self.N))
        out = []
        for t in range(x.shape[1]):
            write = torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], u[:, t], Bs[:, t])
            S = decay[:, t, :, None, None] * S + write
            out.append(torch.einsum("bhpn,bhn->bhp", S, Cs[:, t]))
        o = torch.stack(out, 1) + self.D.view(self.H, -1) * u
        o = o.flatten(2)
        if not hasattr(self, "norm"):
            o = o * swish(z)
        elif self.before:
            o = rms(o, self.norm.weight, self.eps, self.G) * swish(z)
        else:
            o = rms(o * swish(z), self.norm.weight, self.eps, self.G)
        return self.out_proj(o), {"S": S, "conv": conv}


def mlp(c):
    hidden, inner = c["hidden_size"], c.get("intermediate_size")
    if inner is None:  # fla's default: a multiple of 256
        inner = -(int(hidden * (c.get("hidden_ratio") or 4) * 2 / 3) // -256) * 256
    return GatedMLP(hidden, inner, powlu if c.get("hidden_act") == "powlu" else swish)


class GatedDeltaNetBlock(nn.Module):
    def __init__(self, c, attention, window):
        super().__init__()
        self.eps = c["norm_eps"]
        self.attn_norm = Scale(c["hidden_size"])
        mixer = Attention(c["hidden_size"], attention, window) if attention else GatedDeltaNet(c)
        self.attn = mixer
        self.mlp_norm = Scale(c["hidden_size"])
        self.mlp = mlp(c)

    def forward(self, h, state):
        out, state = self.attn(rms(h, self.attn_norm.weight, self.eps), state)
        h = h + out
        return h + self.mlp(rms(h, self.mlp_norm.weight, self.eps)), state


class Mamba2Block(nn.Module):
    def __init__(self, c, attention, window):
        super().__init__()
        self.eps = c["norm_eps"]
        self.norm = Scale(c["hidden_size"])
        mixer = Attention(c["hidden_size"], attention, window) if attention else Mamba2(c)
        self.mixer = mixer

    def forward(self, h, state):
        out, state = self.mixer(rms(h, self.norm.weight, self.eps), state)
        return h + out, state


class Decoder(nn.Module):
    def __init__(self, c, block, norm, window):
        super().__init__()
        specs = c.get("attn") or []
        specs = [specs] if isinstance(specs, dict) else specs
        attends = {i: spec for spec in specs for i in spec["layers"]}
        self.embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        count = c["num_hidden_layers"]
        self.layers = nn.ModuleList(block(c, attends.get(i), window) for i in range(count))
        self.add_module(norm, Scale(c["hidden_size"]))


class Reference(nn.Module):
    """A model and how it sleeps. config is fla's, sleep has window, eviction and loop_range.

    A state is a list of dicts: S and conv of a recurrent layer; keys, values (lists, one entry a
    token) and seen of an attention layer.
    """

    def __init__(self, config: dict, sleep: dict):
        super().__init__()
        self.config, self.sleep = config, sleep
        window = sleep["window"] if sleep.get("eviction") == "sliding" else None
        if config["model_type"] == "gated_deltanet":
            self.model = Decoder(config, GatedDeltaNetBlock, "norm", window)
        else:
            self.backbone = Decoder(config, Mamba2Block, "norm_f", window)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        if config.get("tie_word_embeddings"):
            self.lm_head.weight = self.decoder.embeddings.weight

    @property
    def decoder(self):
        return self.model if hasattr(self, "model") else self.backbone

    def fresh(self):
        return [{} for _ in self.decoder.layers]

    @torch.no_grad()
    def forward(self, tokens, state):
        """One ordinary pass over tokens [B, T]: (logits, state)."""
        h, state = self.decoder.embeddings(torch.as_tensor(tokens)), list(state)
        for i, layer in enumerate(self.decoder.layers):
            h, state[i] = layer(h, state[i])
        norm = getattr(self.decoder, "norm", None) or self.decoder.norm_f
        return self.lm_head(rms(h, norm.weight, self.config["norm_eps"])), state

    @torch.no_grad()
    def consolidate(self, tokens, state, passes):
        """Algorithm 1 (arXiv 2605.26099): the state after a sleep over one window."""
        layers = self.decoder.layers
        lo, hi = self.sleep.get("loop_range") or (0, len(layers))
        h, S = self.decoder.embeddings(torch.as_tensor(tokens)), {}
        order = [*range(lo), *list(range(lo, hi)) * passes, *range(hi, len(layers))]
        last = [None] * len(layers)
        for i in order:
            begin = {**state[i], **({"S": S[i]} if i in S else {})}
            h, last[i] = layers[i](h, begin)
            if "S" in last[i]:
                S[i] = last[i]["S"]
        return self.evict(last)

    def evict(self, state):
        """What crosses the boundary between two windows."""
        if self.sleep.get("eviction") != "sliding":
            return [{"S": layer["S"]} if "S" in layer else {} for layer in state]
        newest = slice(-(self.sleep["window"] - 1), None)
        return [
            {**layer, "keys": layer["keys"][newest], "values": layer["values"][newest]}
            if "keys" in layer
            else layer
            for layer in state
        ]


class TransformersMamba2:
    """The Mamba2ForCausalLM of transformers as it is, and Algorithm 1 with its blocks.

    A state is S of each layer [B, H, P, N], or its cache while no window has been closed.
    """

    def __init__(self, config: dict):
        from transformers import Mamba2Config, Mamba2ForCausalLM

        self.net = Mamba2ForCausalLM(Mamba2Config(**config)).float().eval()

    def fresh(self):
        return None

    def cache(self, state):
        """A cache with S of `state` and nothing else; state itself when it is a cache."""
        from transformers import DynamicCache

        if state is not None and not isinstance(state, list):
            return state
        cache = DynamicCache(config=self.net.config)
        for i, S in enumerate(state or []):
            mixer = self.net.backbone.layers[i].mixer
            nothing = torch.zeros(len(S), mixer.conv_dim, mixer.conv_kernel_size)
            cache.update_conv_state(nothing, i, conv_kernel_size=mixer.conv_kernel_size)
            cache.update_recurrent_state(S, layer_idx=i)
        return cache

    @torch.no_grad()
    def forward(self, tokens, state):
        cache = self.cache(state)
        out = self.net(torch.as_tensor(tokens), cache_params=cache, use_cache=True)
        return out.logits, cache

    @torch.no_grad()
    def consolidate(self, tokens, state, passes):
        h = self.net.backbone.embeddings(torch.as_tensor(tokens))
        for _ in range(passes):
            cache = self.cache(state)
            for block in self.net.backbone.layers:
                h = block(h, cache_params=cache)
            state = [layer.recurrent_states[0].clone() for layer in cache.layers]
        return state
