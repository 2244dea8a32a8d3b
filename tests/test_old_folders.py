"""Model folders that an earlier version wrote: they open, and compute what they did.

`data/models` was written at commit 3d397b4: a sleep_hybrid, and a 4-bit llama with sleep layers.
Its logits.npy is [2, 8, vocab]: of TOKENS, then of TOKENS again after a sleep of two passes.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.models.load import fingerprint, load_model
from mlx_sleep.sleep import consolidate

FOLDERS = Path(__file__).parent / "data" / "models"
TOKENS = mx.array([[5, 31, 7, 7, 22, 3, 19, 30]])


@pytest.mark.parametrize("name", ["sleep_hybrid", "llama"])
def test_an_old_folder_opens(name):
    model, config = load_model(FOLDERS / name)
    awake, _ = model(TOKENS)
    state, _ = consolidate(model, model.init_state(), TOKENS, 2)
    slept, _ = model(TOKENS, state)
    expected = np.load(FOLDERS / name / "logits.npy")
    np.testing.assert_allclose(mx.concatenate([awake, slept]), expected, atol=1e-4)
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # the sleep was worth a test
    # Memories name the model by it.
    assert fingerprint(FOLDERS / name) == config["fingerprint"]
