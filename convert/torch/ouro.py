"""Ouro in PyTorch, as its makers published it, with sleep layers and Algorithm 1: for comparisons.

Written from the published modelling code (ByteDance/Ouro-1.4B, arXiv 2510.25741), the Jet-Nemotron
and Gated DeltaNet papers and arXiv 2605.26099, in the plainest form: one row at a time, every rule
as a loop over tokens, attention over lists. Parameters carry the checkpoints' names, and sleep
layers those of `mlx_sleep.models.inserted`. Only `verify` and tests use it.

A state is {(loop, block): entry}; an entry has "kv" (a list of (position, k, v)), or "S" and
"conv" (a list of earlier inputs). `seen` counts the tokens of a row so far.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .layers import GatedMLP, RMSNorm


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.d = c, c["head_dim"]
        D, H, Hkv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        self.q_proj = nn.Linear(D, H * self.d, bias=False)
        self.k_proj = nn.Linear(D, Hkv * self.d, bias=False)
        self.v_proj = nn.Linear(D, Hkv * self.d, bias=False)
        self.o_proj = nn.Linear(H * self.d, D, bias=False)

    def rotate(self, x, position):
        half = self.d // 2
        angle = position * self.c["rope_theta"] ** (-torch.arange(half, dtype=x.dtype) / half)
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def forward(self, x, entry, seen, sliding):
        H, Hkv, kv, out = (
            self.c["num_attention_heads"],
            self.c["num_key_value_heads"],
            list(entry.get("kv", [])),
            [],
        )
        for t, x_t in enumerate(x):
            at = seen + t
            q = self.rotate(self.q_proj(x_t).view(H, self.d), at)
            k = self.rotate(self.k_proj(x_t).view(Hkv, self.d), at)
            kv.append((at, k, self.v_proj(x_t).view(Hkv, self.d)))
            read = [(k, v) for p, k, v in kv if sliding is None or p > at - sliding]
            keys = torch.stack([k for k, _ in read]).repeat_interleave(H // Hkv, 1)
            values = torch.stack([v for _, v in read]).repeat_interleave(H // Hkv, 1)
            p = torch.softmax(torch.einsum("hd,shd->hs", q, keys) * self.d**-0.5, -1)
            out.append(self.o_proj(torch.einsum("hs,shd->hd", p, values).reshape(-1)))
        return torch.stack(out), {"kv": kv}


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, eps = c["hidden_size"], c["rms_norm_eps"]
        self.self_attn, self.mlp = Attention(c), GatedMLP(D, c["intermediate_size"])
        self.input_layernorm, self.input_layernorm_2 = RMSNorm(D, eps), RMSNorm(D, eps)
        self.post_attention_layernorm = RMSNorm(D, eps)
        self.post_attention_layernorm_2 = RMSNorm(D, eps)

    def forward(self, h, entry, seen, sliding):
        out, entry = self.self_attn(self.input_layernorm(h), entry, seen, sliding)
        h = h + self.input_layernorm_2(out)
        return h + self.post_attention_layernorm_2(
            self.mlp(self.post_attention_layernorm(h))
        ), entry


def delta_rule(S, q, k, v, beta, g):
    """One token: S [H, Dv, Dk], q and k [H, Dk], v [H, Dv], beta and g [H] -> (o [H, Dv], S)."""
    erase = torch.eye(k.shape[-1], dtype=S.dtype) - beta[:, None, None] * (
        k[:, :, None] * k[:, None, :]
    )
    S = g.exp()[:, None, None] * S @ erase + (beta[:, None] * v)[:, :, None] * k[:, None, :]
    return (S @ q[:, :, None])[:, :, 0], S


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


class Mixer(nn.Module):
    """What both mixers share: the tokens one by one, the convolution's left context, the gate."""

    def sizes(self, c):
        self.H, self.Dk = c["num_heads"], c["head_dim"]
        self.Dv, self.K = round(c["head_dim"] * c["expand_v"]), c["conv_size"]
        self.A_log = nn.Parameter(torch.zeros(self.H))
        self.dt_bias = nn.Parameter(torch.zeros(self.H))

    def forward(self, x, entry, seen, sliding):
        zero = torch.zeros(self.H, self.Dv, self.Dk, dtype=x.dtype)
        S, conv, out = entry.get("S", zero), list(entry.get("conv", [])), []
        for x_t in x:
            conv.append(self.convolved_input(x_t))
            near = [torch.zeros_like(conv[-1])] * max(0, self.K - len(conv)) + conv[-self.K :]
            q, k, v = self.qkv(x_t, torch.stack(near))
            b, a = self.gates(x_t)
            g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
            q, k = unit(q) * self.Dk**-0.5, unit(k)
            o, S = delta_rule(S, q, k, v.view(self.H, self.Dv), b.sigmoid(), g)
            out.append(self.output(o, x_t))
        return torch.stack(out), {"S": S, "conv": conv[-(self.K - 1) :]}


class GatedDeltaNet(Mixer):
    def __init__(self, D, c):
        super().__init__()
        self.sizes(c)
        channels = self.H * (2 * self.Dk + self.Dv)
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, self.H * self.Dv, bias=False)
        self.in_proj_ba = nn.Linear(D, 2 * self.H, bias=False)
        self.conv_weight = nn.Parameter(torch.zeros(channels, self.K))
        self.norm = RMSNorm(self.Dv, c["norm_eps"])
        self.out_proj = nn.Linear(self.H * self.Dv, D, bias=False)

    def convolved_input(self, x_t):
        return self.in_proj_qkv(x_t)

    def qkv(self, x_t, near):
        u, keys = F.silu((near * self.conv_weight.T).sum(0)), self.H * self.Dk
        return u[:keys].view(self.H, -1), u[keys : 2 * keys].view(self.H, -1), u[2 * keys :]

    def gates(self, x_t):
        return self.in_proj_ba(x_t).chunk(2)

    def output(self, o, x_t):
        return self.out_proj((self.norm(o) * F.silu(self.in_proj_z(x_t).view_as(o))).reshape(-1))


class JetBlock(Mixer):
    def __init__(self, D, c):
        super().__init__()
        self.sizes(c)
        keys, values = self.H * self.Dk, self.H * self.Dv
        for name, size in {"q": keys, "k": keys, "v": values, "g": values}.items():
            setattr(self, f"{name}_proj", nn.Linear(D, size, bias=False))
        self.b_proj, self.a_proj = (
            nn.Linear(D, self.H, bias=False),
            nn.Linear(D, self.H, bias=False),
        )
        inner = values // c["dconv_generator_reduction"]
        generator = nn.Module()
        generator.w1 = nn.Linear(D, inner, bias=False)
        generator.w2 = nn.Linear(inner, values * self.K)
        self.dynamic_conv1d = nn.Module()
        self.dynamic_conv1d.kernel_generator = generator
        self.o_norm = RMSNorm(self.Dv, c["norm_eps"])
        self.o_proj = nn.Linear(values, D, bias=False)

    def convolved_input(self, x_t):
        return self.v_proj(x_t)

    def qkv(self, x_t, near):
        generator = self.dynamic_conv1d.kernel_generator
        taps = generator.w2(F.silu(generator.w1(x_t))).view(-1, self.K)
        q, k = F.silu(self.q_proj(x_t)), F.silu(self.k_proj(x_t))
        return q.view(self.H, -1), k.view(self.H, -1), F.silu((near * taps.T).sum(0))

    def gates(self, x_t):
        return self.b_proj(x_t), self.a_proj(x_t)

    def output(self, o, x_t):
        return self.o_proj((self.o_norm(o) * F.silu(self.g_proj(x_t).view_as(o))).reshape(-1))


class SleepLayer(nn.Module):
    def __init__(self, D, c):
        super().__init__()
        self.norm = RMSNorm(D, c["norm_eps"])
        self.mixer = {"jet": JetBlock, "gated_deltanet": GatedDeltaNet}[c["kind"]](D, c)

    def forward(self, h, entry, seen, sliding):
        out, entry = self.mixer(self.norm(h), entry, seen, sliding)
        return h + out, entry


class Ouro(nn.Module):
    """c: the contents of a checkpoint's config.json; sleep: {"window", "eviction"}."""

    def __init__(self, c, sleep):
        super().__init__()
        self.c, self.sleep, D = c, sleep, c["hidden_size"]
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(c["vocab_size"], D)
        self.model.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(D, c["rms_norm_eps"])
        self.model.early_exit_gate = nn.Linear(D, 1)
        self.lm_head = nn.Linear(D, c["vocab_size"], bias=False)
        inserted = c.get("sleep_layers", [])
        if inserted:
            self.sleep_layers = nn.ModuleList(SleepLayer(D, layer) for layer in inserted)
        self.blocks = []
        for i in range(len(self.model.layers) + 1):
            self.blocks += [
                self.sleep_layers[j] for j, x in enumerate(inserted) if x["before"] == i
            ]
            self.blocks += self.model.layers[i : i + 1]

    @property
    def sliding(self):
        return self.sleep["window"] if self.sleep["eviction"] == "sliding" else None

    @torch.no_grad()
    def loops(self, tokens, state, seen):
        """A wake pass over the tokens [T] of one row: (h of each loop, gate logits, state)."""
        h, old, state, hs = self.model.embed_tokens(tokens), state, dict(state), []
        for u in range(self.c["total_ut_steps"]):
            for i, block in enumerate(self.blocks):
                entry = dict(old.get((u, i), {}))
                if "S" not in entry and "S" in old.get((0, i), {}):
                    entry["S"] = old[0, i]["S"]
                h, state[u, i] = block(h, entry, seen, self.sliding)
            h = self.model.norm(h)
            hs.append(h)
        return hs, torch.cat([self.model.early_exit_gate(h) for h in hs], -1), state

    @torch.no_grad()
    def forward(self, tokens, state, seen=0):
        """(logits [T, vocab], state). A token reads the first loop that its gate stops at."""
        hs, gates, state = self.loops(tokens, state, seen)
        last, left, reached = (
            len(hs) - 1,
            torch.ones_like(gates[:, 0]),
            torch.zeros_like(gates[:, 0]),
        )
        out, open_ = hs[-1].clone(), torch.ones_like(left, dtype=torch.bool)
        for u in range(last):
            stop = gates[:, u].sigmoid()
            reached, left = reached + stop * left, left * (1 - stop)
            now = open_ & (reached >= self.c["early_exit_threshold"])
            out[now], open_ = hs[u][now], open_ & ~now
        return self.lm_head(out), state

    @torch.no_grad()
    def consolidate(self, tokens, state, passes, seen=0):
        """Algorithm 1 over a window of one row, from the state at its start: the state after it.

        With a sliding eviction pass n is loop n for the KV and the convolution that stay, as far
        as there are so many loops; loops without a pass take the last pass's, and the last loop
        takes the last pass's in any case.
        """
        steps = self.c["total_ut_steps"]
        h, S, left = self.model.embed_tokens(tokens), {}, {}
        for n in range(passes):
            for i, block in enumerate(self.blocks):
                entry = dict(state.get((min(n, steps - 1), i), {}))
                entry.pop("S", None)
                if n == 0 and "S" in state.get((0, i), {}):
                    entry["S"] = state[0, i]["S"]
                elif i in S:
                    entry["S"] = S[i]
                h, entry = block(h, entry, seen, self.sliding)
                if "S" in entry:
                    S[i] = entry.pop("S")
                left[n, i] = entry
            h = self.model.norm(h)
        new = {}
        for u in range(steps):
            n = passes - 1 if u == steps - 1 else min(u, passes - 1)
            for i in range(len(self.blocks)):
                new[u, i] = dict(left[n, i])
                if u == 0 and i in S:
                    new[u, i]["S"] = S[i]
        return self.evict(new)

    def evict(self, state):
        keep = self.sleep["window"] - 1
        kept = {}
        for at, entry in state.items():
            if self.sleep["eviction"] == "hard":
                kept[at] = {"S": entry["S"]} if "S" in entry else {}
            else:
                kept[at] = {**entry, "kv": entry["kv"][-keep:]} if "kv" in entry else entry
        return kept
