"""The gated delta rule in PyTorch: its definition, and two faster ways to the same numbers.

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t,  a_t = exp(g_t)

For all: q, k [B, T, H, Dk], v [B, T, H, Dv], g (log decay, at most 0) and beta [B, T, H],
S [B, H, Dv, Dk]. They return o [B, T, H, Dv] and the last S, float32 or wider. A token with g = 0
and beta = 0 leaves S as it is. (Gated DeltaNet, arXiv 2412.06464.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

CHUNK = 64  # tokens of one triangular solve

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def naive(q, k, v, g, beta, S):
    """The definition, token by token."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g, beta, S = (x.to(wide) for x in (q, k, v, g, beta, S))
    outputs = []
    for t in range(q.shape[1]):
        S = g[:, t].exp()[..., None, None] * S
        written = v[:, t] - torch.einsum("bhvk,bhk->bhv", S, k[:, t])
        S = S + (beta[:, t, :, None] * written)[..., None] * k[:, t, :, None]
        outputs.append(torch.einsum("bhvk,bhk->bhv", S, q[:, t]))
    return torch.stack(outputs, 1), S


def chunked(q, k, v, g, beta, S, chunk: int = CHUNK):
    """By chunks, in the WY form: everything of all chunks at once, but for the chain of their S."""
    wide = torch.promote_types(q.dtype, torch.float32)
    B, T, H, Dk = k.shape
    extra = -T % chunk

    def split(x):
        """[B, T, H, ...] to [N, B, H, C, ...], the last chunk filled with zeros."""
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, extra]).to(wide)
        return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, *range(4, x.ndim + 1)).contiguous()

    q, k, v, g, beta = (split(x) for x in (q, k, v, g[..., None], beta[..., None]))
    G = g.cumsum(-2)  # [N, B, H, C, 1]
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=k.device).triu(1)
    decay = (G - G.mT).masked_fill(later, -torch.inf).exp()
    below = beta * decay * (k @ k.mT)
    rows = torch.cat([beta * v, beta * G.exp() * k], -1)
    values, reads = solve_unit_lower(below, rows).split([v.shape[-1], Dk], -1)
    to_end = (G[..., -1:, :] - G).exp() * k
    # S at the end of a chunk is S at its start times a matrix, plus another.
    keep = torch.diag_embed(G[..., -1, :].exp().expand(*G.shape[:-2], Dk)) - reads.mT @ to_end
    states = Chain.apply(S.to(wide), keep, values.mT @ to_end)
    starts = states[:-1]
    news = values - reads @ starts.mT
    o = (G.exp() * q) @ starts.mT + (decay * (q @ k.mT)) @ news
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T], states[-1]


class Chain(torch.autograd.Function):
    """S_{n+1} = S_n keep_n + add_n for n = 0 to N - 1, one product a step in each direction.

    S [B, H, Dv, Dk]; keep [N, B, H, Dk, Dk]; add [N, B, H, Dv, Dk]. All S [N + 1, B, H, Dv, Dk].
    """

    @staticmethod
    def forward(ctx, S, keep, add):
        states = torch.empty(len(add) + 1, *S.shape, dtype=S.dtype, device=S.device)
        states[0] = S
        flat = states.flatten(1, 2)
        for n, (k, a) in enumerate(zip(keep.flatten(1, 2), add.flatten(1, 2), strict=True)):
            torch.baddbmm(a, flat[n], k, out=flat[n + 1])
        ctx.save_for_backward(states, keep)
        return states

    @staticmethod
    def backward(ctx, grad):
        states, keep = ctx.saved_tensors
        grads = grad.clone(memory_format=torch.contiguous_format)
        flat, keeps = grads.flatten(1, 2), keep.flatten(1, 2)
        for n in reversed(range(len(keep))):
            flat[n].baddbmm_(flat[n + 1], keeps[n].mT)
        return grads[0], states[:-1].mT @ grads[1:], grads[1:]


def solve_unit_lower(below, rows):
    """(I + A)^-1 rows, where A [..., C, C] is what `below` has under its diagonal.

    CUDA's triangular solver is slow for many small matrices: there the inverse is made of products.
    """
    if below.is_cuda and below.shape[-1] & (below.shape[-1] - 1) == 0:
        return UnitLowerInverse.apply(below) @ rows
    return torch.linalg.solve_triangular(below, rows, upper=False, unitriangular=True)


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1, where A [..., C, C] is what x has under its diagonal; C is a power of two.

    Neighbouring blocks are merged, [[P, 0], [R, Q]]^-1 = [[P', 0], [-Q' R P', Q']] with ' for the
    inverse, until there is one. (The power series loses its digits where keys repeat.)
    """

    @staticmethod
    def forward(ctx, x):
        C = x.shape[-1]
        at = torch.arange(C, device=x.device)
        inverse = torch.eye(C, dtype=x.dtype, device=x.device)
        size = 1
        while size < C:
            block = at // size
            merged = (block[:, None] > block) & (block[:, None] // 2 == block // 2)
            off = x.masked_fill(~merged, 0)
            inverse = inverse - (off if size == 1 else inverse @ (off @ inverse))
            size *= 2
        ctx.save_for_backward(inverse)
        return inverse.expand_as(x)

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def fla(q, k, v, g, beta, S):
    """flash-linear-attention's Triton kernel: CUDA alone; q, k, v in bfloat16."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    o, S = chunk_gated_delta_rule(
        q,
        k.to(q.dtype),
        v.to(q.dtype),
        g=g.float(),
        beta=beta.float(),
        scale=1.0,
        initial_state=S.float().mT.contiguous(),
        output_final_state=True,
    )
    return o.float(), S.mT


def errors(rule: Rule, device, dtype=torch.bfloat16, T: int = 300, seed: int = 0) -> dict:
    """Relative errors of a rule against `chunked` on random inputs: o, S and each gradient.

    Both get the inputs rounded to dtype; `chunked` computes in float32.
    """
    make = torch.Generator().manual_seed(seed)
    shape = (2, T, 4, 64)
    q, k, v = (torch.randn(shape, generator=make) for _ in range(3))
    g = -F.softplus(torch.randn(shape[:3], generator=make) - 5)
    beta = torch.randn(shape[:3], generator=make).sigmoid()
    S = torch.randn(2, 4, 64, 64, generator=make) * 0.3
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    weights = [torch.randn(shape, generator=make), torch.randn(S.shape, generator=make)]
    weights = [w.to(device) for w in weights]
    inputs = [x.to(device, dtype) for x in (q, k, v)] + [x.to(device) for x in (g, beta, S)]
    found = []
    runs: tuple[Rule, ...] = (chunked, rule)
    for run in runs:
        leaves = [x.clone().requires_grad_() for x in inputs]
        o, new = run(*leaves)
        ((o * weights[0]).sum() + (new * weights[1]).sum()).backward()
        found.append([o, new, *(x.grad for x in leaves)])
    names = ("o", "S", "dq", "dk", "dv", "dg", "dbeta", "dS")
    pairs = zip(names, *found, strict=True)
    return {n: ((a - b).float().norm() / a.float().norm()).item() for n, a, b in pairs}


def best_rule(device, tolerance: float = 0.02) -> Rule:
    """fla's kernel where it runs and is right on this device, else `chunked`.

    Some versions of Triton compile its backward pass to wrong results on some GPUs.
    """
    if torch.device(device).type != "cuda":
        return chunked
    try:
        worst = max(errors(fla, device).values())
    except (ImportError, RuntimeError):
        return chunked
    return fla if worst < tolerance else chunked  # NaN is not less
