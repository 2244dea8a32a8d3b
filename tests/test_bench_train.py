"""`bench train`: its PyTorch twin computes the same losses, and the rows say what they should."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import sys

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from typer.testing import CliRunner

from mlx_sleep.cli.bench import app
from mlx_sleep.lab.study import training_speed
from mlx_sleep.models.sleep_hybrid import Model, ModelArgs
from mlx_sleep.training.trainer import Trainer
from mlx_sleep.training.windows import Window, labelled
from mlx_sleep.utils.errors import UserError

assert mlx_sleep  # imported for its effect

CONFIG = {
    "vocab_size": 23,
    "hidden_size": 24,
    "intermediate_size": 20,
    "layer_types": ["attention", "gated_deltanet", "gated_deltanet"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 6,
    "sleep": {"passes": 3, "window": 45},
}


def windows_of(rng):
    """Windows of 45 tokens: more than one chunk of the twin's solver, and not a multiple.

    There are labels enough for gradients of full rank: Muon makes every singular value one, and
    with it whatever rounding left where there should be nothing.
    """
    windows = [Window(mx.array(rng.integers(0, 23, (6, T)))) for T in (45, 7)]
    weights = rng.integers(0, 2, (6, 29)) * rng.random((6, 29))
    weights[:, 0] = 0
    return [*windows, labelled(rng.integers(0, 23, (6, 29)), None, weights)]


def test_the_twin_takes_the_same_steps(tmp_path, rng):
    """Three steps: loss, gradients, clip, Muon and AdamW all show in the losses that follow."""
    pytest.importorskip("torch")
    from mlx_sleep.lab.study.torch_step import Step, tensors

    model = Model(ModelArgs.from_dict(CONFIG))
    weights = [
        (n, x + 0.1 * mx.random.normal(x.shape)) for n, x in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    batches = [windows_of(rng) for _ in range(3)]
    step = Step(model.args, {n: np.array(x) for n, x in weights}, 0.004, 0.002)
    theirs = [step(tensors(windows), 3) for windows in batches]
    ours = []
    trainer = Trainer(
        model, tmp_path, {}, 3, lambda i: (batches[i], 3), warmup=0, cooldown=1e-9,
        muon_lr=0.004, adamw_lr=0.002,
    )  # fmt: skip
    trainer.run(lambda row: ours.append(row["loss"]))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-5)
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)
    after = {n: x.detach().numpy() for n, x in step.model.named_parameters()}
    before, ours = dict(weights), dict(tree_flatten(model.parameters()))
    apart = {
        n: np.linalg.norm(ours[n] - x) / np.linalg.norm(before[n] - x) for n, x in after.items()
    }
    assert max(apart.values()) <= 0.2, apart


def test_rows_and_their_ratio():
    pytest.importorskip("torch")
    (row,) = training_speed.rows([2], repeats=1, batch=4)
    assert row["tokens"] == 4 * 34
    assert row["ratio"] == pytest.approx(row["tokens_per_second"] / row["torch_tokens_per_second"])
    assert 0 < row["checkpointed_peak_bytes"] < row["peak_bytes"]


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="pip install 'mlx-sleep\\[torch\\]'"):
        CliRunner().invoke(app, ["train"], catch_exceptions=False)
