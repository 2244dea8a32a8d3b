"""The paper's optimizer: Muon for the matrices of the blocks, AdamW for the rest."""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim


def make_optimizer(
    muon_lr: float, adamw_lr: float, weight_decay: float = 0.0
) -> optim.MultiOptimizer:
    """Muon for the blocks' projection matrices, AdamW for embeddings, norms, gates' biases.

    `optimizers` of the result are the two, in this order. weight_decay is AdamW's.
    """
    muon = optim.Muon(learning_rate=muon_lr, momentum=0.95, weight_decay=0.0)
    adamw = optim.AdamW(learning_rate=adamw_lr, betas=[0.9, 0.95], weight_decay=weight_decay)
    return optim.MultiOptimizer([muon, adamw], [is_projection])


def is_projection(name: str, x: mx.array) -> bool:
    """Whether Muon trains this parameter: a matrix of a block that multiplies activations."""
    return x.ndim == 2 and ("proj" in name or "kernel_generator" in name)
