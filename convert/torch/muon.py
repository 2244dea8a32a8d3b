"""Muon (Jordan 2024) with Nesterov momentum: matrices of one shape are taken together."""

from __future__ import annotations

from collections import defaultdict

import torch


class Muon(torch.optim.Optimizer):
    """For matrices [out, in]: each step has singular values near lr * sqrt(max(1, out / in))."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for (rows, columns), ps in by_shape.items():
                for p in ps:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                grads = [p.grad for p in ps]
                momenta = [self.state[p]["momentum"] for p in ps]
                torch._foreach_mul_(momenta, group["momentum"])
                torch._foreach_add_(momenta, grads)
                steps = torch._foreach_add(grads, momenta, alpha=group["momentum"])
                steps = orthogonal(torch.stack(steps)).to(ps[0].dtype)
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                torch._foreach_add_(ps, list(steps.unbind()), alpha=-scale)


def orthogonal(x, steps: int = 5):
    """The nearest orthogonal matrices to x [n, R, C], roughly and in bfloat16: the quintic
    Newton-Schulz iteration of Muon."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(steps):
        A = x @ x.mT
        x = a * x + (b * A + c * A @ A) @ x
    return x.mT if tall else x
