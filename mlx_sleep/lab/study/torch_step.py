"""The training step of `bench train` in PyTorch: what `mlx_sleep` is compared to.

The model is `convert.torch.sleep_hybrid`, with its loop over tokens and its mask replaced
by what is fast in PyTorch: chunks and the triangular solver, causal attention. Algorithm 1 with
hard eviction, and the optimizer. No padding, no sliding window, no Mamba-2. Needs the torch extra.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import nn

from ...convert.torch import sleep_hybrid as definition

CHUNK = 32  # tokens of one triangular solve


class Attention(definition.Attention):
    """For a window on its own, which is all that hard eviction leaves."""

    def forward(self, x, state, sliding):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.H, -1)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.Hkv, -1)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.Hkv, -1).transpose(1, 2)
        q, k = (definition.rope(a, 0, self.theta) for a in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.H != self.Hkv)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1)), {}


class GatedDeltaNet(definition.GatedDeltaNet):
    """By chunks; the convolution begins in each window and pass."""

    def forward(self, x, state, sliding):
        B, T, _ = x.shape
        qkv, _ = definition.short_conv(self.in_proj_qkv(x), self.conv_weight, None)
        sizes = [self.Hk * self.Dk, self.Hk * self.Dk, self.Hv * self.Dv]
        q, k, v = F.silu(qkv).split(sizes, dim=-1)
        q, k = (definition.unit(a.reshape(B, T, self.Hk, self.Dk)) for a in (q, k))
        group = self.Hv // self.Hk
        if group > 1:
            q, k = (a.repeat_interleave(group, dim=2) for a in (q, k))
        beta, a = self.in_proj_ba(x).chunk(2, dim=-1)
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        v = v.reshape(B, T, self.Hv, self.Dv)
        o, S = gated_delta(q * self.Dk**-0.5, k, v, g, beta.sigmoid(), state.get("S"))
        z = self.in_proj_z(x).view(B, T, self.Hv, self.Dv)
        return self.out_proj((self.norm(o) * F.silu(z)).reshape(B, T, -1)), {"S": S}


def gated_delta(q, k, v, g, beta, S):
    """The gated delta rule by chunks; shapes as in ops/gated_delta.py, S None for zero."""
    B, T, H, Dk = k.shape
    S = k.new_zeros(B, H, v.shape[-1], Dk) if S is None else S
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    g, beta = g.transpose(1, 2), beta.transpose(1, 2)[..., None]
    outputs = []
    for start in range(0, T, CHUNK):
        q_c, k_c, v_c, g_c, b_c = (x[:, :, start : start + CHUNK] for x in (q, k, v, g, beta))
        C = k_c.shape[2]
        G = g_c.cumsum(-1)
        later = torch.ones(C, C, dtype=torch.bool, device=k.device).triu(1)
        decay = (G[..., :, None] - G[..., None, :]).masked_fill(later, -torch.inf).exp()
        from_start = G.exp()[..., None]
        # The solver reads only what is below the diagonal.
        below = b_c * decay * (k_c @ k_c.mT)
        written = b_c * (v_c - from_start * (k_c @ S.mT))
        u = torch.linalg.solve_triangular(below, written, upper=False, unitriangular=True)
        outputs.append(from_start * (q_c @ S.mT) + (decay * (q_c @ k_c.mT)) @ u)
        to_end = (G[..., -1:] - G).exp()[..., None]
        S = from_start[..., -1:, :] * S + (to_end * u).mT @ k_c
    return torch.cat(outputs, dim=2).transpose(1, 2), S


class Model(definition.SleepHybrid):
    """args: the ModelArgs of sleep_hybrid, with QK norm and tied embeddings."""

    def __init__(self, args):
        config = asdict(args)
        super().__init__(config)
        fast = {"attention": Attention, "gated_deltanet": GatedDeltaNet}
        for layer, kind in zip(self.layers, args.layer_types, strict=True):
            layer.mixer = fast[kind]({**definition.DEFAULTS, **config})

    def loss(self, windows, final, positions, targets, weights, passes: int):
        """Algorithm 1's loss: N passes over each of `windows` [B, T], one over `final` [B, F].

        positions, targets [B, K] int64 and weights [B, K] as in `training`'s Window.
        """
        state = self.fresh()
        for tokens in windows:
            h = self.embed_tokens(tokens)
            for _ in range(passes):
                h = self.blocks(h, state)
        h = self.blocks(self.embed_tokens(final), state)
        h = h.gather(1, positions[..., None].expand(-1, -1, h.shape[-1]))
        logits = F.linear(self.norm(h), self.embed_tokens.weight)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (losses * weights.flatten()).sum() / weights.sum()

    def blocks(self, h, state):
        for i, layer in enumerate(self.layers):
            h, state[i] = layer(h, state[i], None)
        return h


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum, in float32 as MLX's is; torch.optim.Muon rounds
    to bfloat16, which CPUs are slow at."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                m = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                step = orthogonal(p.grad.lerp(m, group["momentum"]))
                scale = max(1.0, p.shape[0] / p.shape[1]) ** 0.5
                p.add_(step, alpha=-group["lr"] * scale)


class Adam(torch.optim.Optimizer):
    """AdamW without decay and, like MLX's by default, without bias correction."""

    def __init__(self, parameters, lr: float, betas=(0.9, 0.95), eps: float = 1e-8):
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                m = state["m"].lerp_(p.grad, 1 - first)
                v = state["v"].mul_(second).addcmul_(p.grad, p.grad, value=1 - second)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-group["lr"])


def orthogonal(x, steps: int = 5):
    """The nearest orthogonal matrix, roughly: the quintic Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x


class Step:
    """One training step, as `train.Trainer` does it: loss, backward, clip, Muon and AdamW."""

    def __init__(self, args, weights: dict, muon_lr: float, adamw_lr: float, clip: float = 1.0):
        """weights: name -> numpy array, those of the MLX model."""
        self.model = Model(args)
        tensors = {n: torch.from_numpy(x) for n, x in weights.items()}
        tensors["lm_head.weight"] = tensors["embed_tokens.weight"]
        self.model.load_state_dict(tensors)
        named = list(self.model.named_parameters())
        muon = [p for name, p in named if p.ndim == 2 and "proj" in name]
        rest = [p for name, p in named if not (p.ndim == 2 and "proj" in name)]
        self.optimizers: list[torch.optim.Optimizer] = [Muon(muon, muon_lr), Adam(rest, adamw_lr)]
        self.clip = clip

    def __call__(self, batch, passes: int) -> float:
        """batch: (windows, final, positions, targets, weights), tensors; the loss."""
        windows, final, positions, targets, weights = batch
        loss = self.model.loss(windows, final, positions, targets, weights, passes)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def tensors(windows) -> tuple:
    """Unpadded windows as what `Step` takes."""
    import numpy as np

    *slept, last = (
        {n: torch.from_numpy(np.array(x)) for n, x in c._asdict().items() if x is not None}
        for c in windows
    )
    return (
        [w["tokens"].long() for w in slept],
        last["tokens"].long(),
        last["positions"].long(),
        last["targets"].long(),
        last["weights"],
    )
