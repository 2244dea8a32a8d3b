"""Causal softmax attention over a layer's KV cache, as every architecture here needs it.

It doesn't know when a model sleeps: what the cache holds is the state that it was given.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..utils.errors import UserError
from .base import LayerState, append_kv


class Attention(nn.Module):
    """Attention with its projections: RoPE over matching halves, grouped KV heads.

    sliding      newest tokens that a token sees, itself included; None for all
    qkv_bias     whether q, k and v have biases
    qk_norm_eps  of an RMSNorm over each head of q and k; None for no such norm
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        rope_theta: float | None,
        sliding: int | None = None,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.rope_theta, self.sliding = rope_theta, sliding
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        if qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps)
            self.k_norm = nn.RMSNorm(head_dim, eps=qk_norm_eps)

    @classmethod
    def from_args(cls, args: Any, sliding: int | None = None, **options) -> Attention:
        """With the sizes of a ModelArgs."""
        return cls(
            args.hidden_size,
            args.num_attention_heads,
            args.num_key_value_heads,
            args.head_dim,
            rope_theta=args.rope_theta,
            sliding=sliding,
            **options,
        )

    def __call__(self, x, state: LayerState, mask=None):
        B, T, _ = x.shape
        q = self.q_proj(x).reshape(B, T, self.num_heads, self.head_dim)
        k = self.k_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        v = self.v_proj(x).reshape(B, T, self.num_kv_heads, self.head_dim)
        if "q_norm" in self:
            q, k = self.q_norm(q), self.k_norm(k)
        o, state = attend(q, k, v, state, mask, rope_theta=self.rope_theta, sliding=self.sliding)
        return self.o_proj(o), state


def check_heads(args: Any) -> None:
    """Fills in the usual num_key_value_heads and head_dim of a ModelArgs that leaves them out.

    UserError for heads that do not fit.
    """
    args.num_key_value_heads = args.num_key_value_heads or args.num_attention_heads
    args.head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    if args.num_attention_heads % args.num_key_value_heads:
        raise UserError("num_attention_heads must be a multiple of num_key_value_heads")
    if args.head_dim % 2:
        raise UserError(f"head_dim must be even for RoPE, not {args.head_dim}")


def attend(
    q,
    k,
    v,
    state: LayerState,
    mask=None,
    *,
    rope_theta: float | None,
    sliding: int | None = None,
):
    """(o [B, T, H * d], the layer's new state) for new tokens after those of the cache.

    q           [B, T, H, d]; k, v [B, T, Hkv, d], H a multiple of Hkv, without RoPE
    mask        [B, T] bool, False for padding on the right; o is meaningless there
    rope_theta  base of the rotary embedding, over pairs (0, d/2), (1, d/2 + 1), ...; None for no
                positions
    sliding     newest tokens that a token sees, itself included; None for all
    """
    B, T, _, d = q.shape
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))  # [B, H, T, d]
    offset, past = state.get("offset", 0), state.get("length", 0)
    if rope_theta is not None:
        rope = {"traditional": False, "base": rope_theta, "scale": 1.0, "offset": offset}
        q, k = (mx.fast.rope(a, d, **rope) for a in (q, k))
    state = append_kv(state, k, v, mask)
    end = state["length"]
    o = mx.fast.scaled_dot_product_attention(
        q,
        state["keys"][:, :, :end],
        state["values"][:, :, :end],
        scale=d**-0.5,
        mask=attention_mask(T, past, state, sliding),
    )
    return o.transpose(0, 2, 1, 3).reshape(B, T, -1), state


def attention_mask(T: int, past: int, state: LayerState, sliding: int | None = None):
    """Who sees whom, for T new tokens: None, "causal", or bool [T, S] or [B, 1, T, S].

    state is the layer's after them, with S = past + T slots in use.
    """
    end = past + T
    if sliding is not None and end <= sliding:
        sliding = None
    # Padding is on the right: with no past, causality alone hides it from real tokens.
    padded = "valid" in state and past > 0
    if sliding is None and not padded:
        return None if T == 1 else "causal"
    query, key = mx.arange(past, end)[:, None], mx.arange(end)
    sees = key <= query
    if "valid" in state:
        sees = sees & state["valid"][:, None, None, :]
        # Positions count real tokens only, so that a padded row sees as far as a full one.
        at = mx.cumsum(state["valid"], axis=1)[:, None, :]
        query, key = at[:, :, past:, None], at[:, :, None, :]
    return sees if sliding is None else sees & (key > query - sliding)
