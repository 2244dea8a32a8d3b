"""The training step of `bench train` in PyTorch: what `mlx_sleep` is compared to.

The hybrid of attention and Gated DeltaNet, Algorithm 1 with hard eviction, and the optimizer, with
the same arithmetic and the parameters' names of models/sleep_hybrid.py, written for PyTorch: its
attention, its triangular solver, its convolution. No padding, no sliding window, no Mamba-2. Needs
the torch extra.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 32  # tokens of one triangular solve
ACTIVATIONS = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}


class Attention(nn.Module):
    def __init__(self, args):
        super().__init__()
        D, d = args.hidden_size, args.head_dim
        self.heads, self.kv_heads, self.d = args.num_attention_heads, args.num_key_value_heads, d
        self.theta = args.rope_theta
        self.q_proj = nn.Linear(D, self.heads * d, bias=False)
        self.k_proj = nn.Linear(D, self.kv_heads * d, bias=False)
        self.v_proj = nn.Linear(D, self.kv_heads * d, bias=False)
        self.o_proj = nn.Linear(self.heads * d, D, bias=False)
        self.q_norm = nn.RMSNorm(d, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(d, eps=args.rms_norm_eps)

    def forward(self, x, S):
        B, T, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(B, T, self.heads, self.d)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(B, T, self.kv_heads, self.d)).transpose(1, 2)
        v = self.v_proj(x).view(B, T, self.kv_heads, self.d).transpose(1, 2)
        q, k = self.rotated(q), self.rotated(k)
        gqa = self.heads != self.kv_heads
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.o_proj(o.transpose(1, 2).reshape(B, T, -1)), S

    def rotated(self, x):
        half = self.d // 2
        at = torch.arange(x.shape[2], dtype=x.dtype, device=x.device)
        rate = self.theta ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
        angle = at[:, None] * rate
        cos, sin = angle.cos(), angle.sin()
        a, b = x.split(half, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class GatedDeltaNet(nn.Module):
    def __init__(self, args):
        super().__init__()
        D = args.hidden_size
        self.Hk, self.Hv = args.linear_num_key_heads, args.linear_num_value_heads
        self.Dk, self.Dv = args.linear_key_head_dim, args.linear_value_head_dim
        channels = 2 * self.Hk * self.Dk + self.Hv * self.Dv
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, self.Hv * self.Dv, bias=False)
        self.in_proj_ba = nn.Linear(D, 2 * self.Hv, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(channels, args.linear_conv_kernel_dim))
        self.A_log = nn.Parameter(torch.empty(self.Hv))
        self.dt_bias = nn.Parameter(torch.empty(self.Hv))
        self.norm = nn.RMSNorm(self.Dv, eps=args.rms_norm_eps)
        self.out_proj = nn.Linear(self.Hv * self.Dv, D, bias=False)

    def forward(self, x, S):
        B, T, _ = x.shape
        qkv = self.in_proj_qkv(x).transpose(1, 2)
        K = self.conv_weight.shape[1]
        qkv = F.conv1d(F.pad(qkv, (K - 1, 0)), self.conv_weight[:, None], groups=qkv.shape[1])
        sizes = [self.Hk * self.Dk, self.Hk * self.Dk, self.Hv * self.Dv]
        q, k, v = F.silu(qkv).transpose(1, 2).split(sizes, dim=-1)
        q, k = (unit(a.reshape(B, T, self.Hk, self.Dk)) for a in (q, k))
        group = self.Hv // self.Hk
        if group > 1:
            q, k = (a.repeat_interleave(group, dim=2) for a in (q, k))
        beta, a = self.in_proj_ba(x).chunk(2, dim=-1)
        g = -self.A_log.exp() * F.softplus(a + self.dt_bias)
        v = v.reshape(B, T, self.Hv, self.Dv)
        o, S = gated_delta(q * self.Dk**-0.5, k, v, g, beta.sigmoid(), S)
        z = self.in_proj_z(x).view(B, T, self.Hv, self.Dv)
        return self.out_proj((self.norm(o) * F.silu(z)).reshape(B, T, -1)), S


def unit(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


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


class MLP(nn.Module):
    def __init__(self, args):
        super().__init__()
        D, inner = args.hidden_size, args.intermediate_size
        self.gate_proj = nn.Linear(D, inner, bias=False)
        self.up_proj = nn.Linear(D, inner, bias=False)
        self.down_proj = nn.Linear(inner, D, bias=False)
        self.act = ACTIVATIONS[args.hidden_act]

    def forward(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, args, kind):
        super().__init__()
        self.mixer = {"attention": Attention, "gated_deltanet": GatedDeltaNet}[kind](args)
        self.mixer_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    def forward(self, h, S):
        out, S = self.mixer(self.mixer_norm(h), S)
        h = h + out
        return h + self.mlp(self.mlp_norm(h)), S


class Model(nn.Module):
    """args: the ModelArgs of sleep_hybrid, with QK norm and tied embeddings."""

    def __init__(self, args):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = nn.ModuleList(Block(args, kind) for kind in args.layer_types)
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def loss(self, windows, final, positions, targets, weights, passes: int):
        """Algorithm 1's loss: N passes over each of `windows` [B, T], one over `final` [B, F].

        positions, targets [B, K] int64 and weights [B, K] as in `train.Chunk`.
        """
        state = [None] * len(self.layers)
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
            h, state[i] = layer(h, state[i])
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
        self.model.load_state_dict({n: torch.from_numpy(x) for n, x in weights.items()})
        named = list(self.model.named_parameters())
        muon = [p for name, p in named if p.ndim == 2 and "proj" in name]
        rest = [p for name, p in named if not (p.ndim == 2 and "proj" in name)]
        self.optimizers = [Muon(muon, muon_lr), Adam(rest, adamw_lr)]
        self.clip = clip

    def __call__(self, batch, passes: int) -> float:
        """batch: (windows, final, positions, targets, weights), tensors; the loss."""
        loss = self.model.loss(*batch, passes)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def tensors(chunks) -> tuple:
    """`train.Chunk`s (unpadded) as what `Step` takes."""
    import numpy as np

    *windows, last = (
        {n: torch.from_numpy(np.array(x)) for n, x in c._asdict().items() if x is not None}
        for c in chunks
    )
    return (
        [w["tokens"].long() for w in windows],
        last["tokens"].long(),
        last["positions"].long(),
        last["targets"].long(),
        last["weights"],
    )
