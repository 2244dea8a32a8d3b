"""The model and Algorithm 1 once more, in numpy float64, one token and one row at a time.

Written from the paper's equations and sharing no code with the package, so that agreement means
something. `mistake` makes one of the errors that the pseudocode invites, to show that a test
which compares with this reference would catch it.
"""

from __future__ import annotations

import numpy as np


def weights(model) -> dict[str, np.ndarray]:
    from mlx.utils import tree_flatten

    return {name: np.array(x, np.float64) for name, x in tree_flatten(model.parameters())}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def rms(x, w, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def rope(x, position, theta):
    half = x.shape[-1] // 2
    angle = position * theta ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate(
        [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1
    )


class Reference:
    """state: per layer {"S", "conv", "kv"}; kv is a list of (k, v) of earlier tokens."""

    def __init__(self, model, w=None):
        self.args, self.sleep = model.args, model.sleep
        self.w = weights(model) if w is None else w

    def fresh(self):
        return [{"S": None, "conv": None, "kv": [], "seen": 0} for _ in self.args.layer_types]

    def attention(self, p, x, st):
        a, w = self.args, self.w
        H, Hkv, d = a.num_attention_heads, a.num_key_value_heads, a.head_dim
        kv, out, seen = list(st["kv"]), [], st["seen"]
        for x_t in x:
            q = (w[p + "q_proj.weight"] @ x_t).reshape(H, d)
            k = (w[p + "k_proj.weight"] @ x_t).reshape(Hkv, d)
            v = (w[p + "v_proj.weight"] @ x_t).reshape(Hkv, d)
            if a.qk_norm:
                q = rms(q, w[p + "q_norm.weight"], a.rms_norm_eps)
                k = rms(k, w[p + "k_norm.weight"], a.rms_norm_eps)
            q, k = rope(q, seen, a.rope_theta), rope(k, seen, a.rope_theta)
            kv.append((k, v))
            seen += 1
            if self.sleep.eviction == "sliding":
                kv = kv[-self.sleep.window :]
            o = []
            for h in range(H):
                scores = np.array([k_j[h // (H // Hkv)] @ q[h] for k_j, _ in kv]) / np.sqrt(d)
                scores = np.exp(scores - scores.max())
                scores /= scores.sum()
                o.append(
                    sum(s * v_j[h // (H // Hkv)] for s, (_, v_j) in zip(scores, kv, strict=True))
                )
            out.append(w[p + "o_proj.weight"] @ np.concatenate(o))
        return np.stack(out), {**st, "kv": kv, "seen": seen}

    def conv(self, p, x, st):
        w = self.w[p + "conv_weight"]
        K = w.shape[1]
        before = np.zeros((K - 1, x.shape[1])) if st["conv"] is None else st["conv"]
        full = np.concatenate([before, x])
        y = np.stack([(full[t : t + K] * w.T).sum(0) for t in range(len(x))])
        return y, full[len(full) - (K - 1) :]

    def gated_deltanet(self, p, x, st):
        a, w = self.args, self.w
        Hk, Hv, Dk, Dv = (
            a.linear_num_key_heads,
            a.linear_num_value_heads,
            a.linear_key_head_dim,
            a.linear_value_head_dim,
        )
        qkv, conv = self.conv(p, x @ w[p + "in_proj_qkv.weight"].T, st)
        S = np.zeros((Hv, Dv, Dk)) if st["S"] is None else st["S"].copy()
        out = []
        for x_t, u in zip(x, silu(qkv), strict=True):
            q = unit(u[: Hk * Dk].reshape(Hk, Dk)) / np.sqrt(Dk)
            k = unit(u[Hk * Dk : 2 * Hk * Dk].reshape(Hk, Dk))
            v = u[2 * Hk * Dk :].reshape(Hv, Dv)
            ba = w[p + "in_proj_ba.weight"] @ x_t
            b = sigmoid(ba[:Hv])
            decay = np.exp(-np.exp(w[p + "A_log"]) * softplus(ba[Hv:] + w[p + "dt_bias"]))
            o = np.empty((Hv, Dv))
            for h in range(Hv):
                k_h, q_h = k[h // (Hv // Hk)], q[h // (Hv // Hk)]
                erase = np.eye(Dk) - b[h] * np.outer(k_h, k_h)
                S[h] = decay[h] * S[h] @ erase + b[h] * np.outer(v[h], k_h)
                o[h] = S[h] @ q_h
            z = (w[p + "in_proj_z.weight"] @ x_t).reshape(Hv, Dv)
            o = rms(o, w[p + "norm.weight"], a.rms_norm_eps) * silu(z)
            out.append(w[p + "out_proj.weight"] @ o.reshape(-1))
        return np.stack(out), {**st, "S": S, "conv": conv}

    def mamba2(self, p, x, st):
        a, w = self.args, self.w
        H, P, G, N = a.mamba_num_heads, a.mamba_head_dim, a.mamba_n_groups, a.ssm_state_size
        inner = H * P
        proj = x @ w[p + "in_proj.weight"].T
        z, xBC, dt = proj[:, :inner], proj[:, inner:-H], proj[:, -H:]
        xBC, conv = self.conv(p, xBC, st)
        xBC = silu(xBC + w[p + "conv_bias"])
        S = np.zeros((H, P, N)) if st["S"] is None else st["S"].copy()
        out = []
        for z_t, u, dt_t in zip(z, xBC, dt, strict=True):
            v = u[:inner].reshape(H, P)
            k, q = u[inner : inner + G * N].reshape(G, N), u[inner + G * N :].reshape(G, N)
            step = softplus(dt_t + w[p + "dt_bias"])
            o = np.empty((H, P))
            for h in range(H):
                k_h, q_h = k[h // (H // G)], q[h // (H // G)]
                decay = np.exp(-np.exp(w[p + "A_log"][h]) * step[h])
                S[h] = decay * S[h] + step[h] * np.outer(v[h], k_h)
                o[h] = S[h] @ q_h + w[p + "D"][h] * v[h]
            o = rms(o.reshape(-1) * silu(z_t), w[p + "norm.weight"], a.rms_norm_eps)
            out.append(w[p + "out_proj.weight"] @ o)
        return np.stack(out), {**st, "S": S, "conv": conv}

    def block(self, i, h, st):
        p, a, w = f"layers.{i}.", self.args, self.w
        mixer = getattr(self, a.layer_types[i])
        out, st = mixer(p + "mixer.", rms(h, w[p + "mixer_norm.weight"], a.rms_norm_eps), st)
        h = h + out
        x = rms(h, w[p + "mlp_norm.weight"], a.rms_norm_eps)
        gate, up = x @ w[p + "mlp.gate_proj.weight"].T, x @ w[p + "mlp.up_proj.weight"].T
        act = {"silu": silu, "relu": lambda x: np.maximum(x, 0)}[a.hidden_act]
        return h + (act(gate) * up) @ w[p + "mlp.down_proj.weight"].T, st

    def embed(self, tokens):
        return self.w["embed_tokens.weight"][tokens]

    def head(self, h):
        head = self.w.get("lm_head.weight", self.w["embed_tokens.weight"])
        return rms(h, self.w["norm.weight"], self.args.rms_norm_eps) @ head.T

    def forward(self, tokens, state):
        """One ordinary pass: (logits, state)."""
        h, state = self.embed(tokens), list(state)
        for i in range(len(state)):
            h, state[i] = self.block(i, h, state[i])
        return self.head(h), state

    def consolidate(self, tokens, state, passes, mistake=None):
        """Algorithm 1's consolidation of one window."""
        lo, hi = self.sleep.loop_range or (0, len(state))
        start, state = state, list(state)
        h = self.embed(tokens)
        for i in range(lo):
            h, state[i] = self.block(i, h, start[i])
        for _ in range(passes):
            if mistake == "h not carried":
                h = self.embed(tokens)
            for i in range(lo, hi):
                st = dict(start[i])
                if mistake != "S reset":
                    st["S"] = state[i]["S"]
                if mistake == "KV kept":
                    st["kv"], st["seen"] = state[i]["kv"], state[i]["seen"]
                h, state[i] = self.block(i, h, st)
        for i in range(hi, len(state)):
            h, state[i] = self.block(i, h, start[i])
        return self.boundary(state)

    def boundary(self, state):
        kept = []
        for st in state:
            st = dict(st)
            if self.sleep.eviction == "hard":
                st["kv"], st["seen"] = [], 0
            else:
                st["kv"] = st["kv"][-(self.sleep.window - 1) :]
            if not self.sleep.carry_conv:
                st["conv"] = None
            kept.append(st)
        return kept

    def loss(self, chunks, passes, mistake=None):
        """chunks: (tokens, None) to sleep over, (tokens, weights of predicting each) to answer."""
        state, total, weight = self.fresh(), 0.0, 0.0
        for tokens, w in chunks:
            if w is None:
                state = self.consolidate(tokens, state, passes)
                continue
            logits, state = self.forward(tokens, state)
            state = self.boundary(state)
            logits = logits - logits.max(-1, keepdims=True)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for t in range(1, len(tokens)):
                total -= w[t] * logp[t - 1, tokens[t]]
                weight += w[t]
        return total / weight
