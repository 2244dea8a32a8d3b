"""What only mlx-lm implements, against its own forward pass and a naive sleep over its caches."""

from __future__ import annotations

import numpy as np
import pytest

from tests import parity
from tests.parity import CASES, compared, naive, rwkv7

pytest.importorskip("torch")
pytest.importorskip("transformers", parity.TRANSFORMERS)


@pytest.mark.skipif(not rwkv7.ARCHITECTURES, reason="needs fla-core")
def test_rwkv_7_is_flas(rng):
    seen = []
    for _, c in compared(rwkv7, "rwkv7", rng):
        seen.append(c.case)
        assert np.abs(c.theirs).max() > 0.3
        np.testing.assert_allclose(c.ours, c.theirs, atol=1e-4, rtol=0, err_msg=c.case)
        for ours, theirs in zip(c.our_S, c.their_S, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4, err_msg=c.case)
    assert tuple(seen) == CASES


@pytest.mark.parametrize("architecture", naive.ARCHITECTURES)
def test_sleep_is_algorithm_1_over_mlx_lms_caches(rng, architecture):
    seen = []
    for _, c in compared(naive, architecture, rng):
        seen.append(c.case)
        assert np.abs(c.theirs).max() > 0.3
        np.testing.assert_allclose(c.ours, c.theirs, atol=1e-4, rtol=0, err_msg=c.case)
        assert len(c.our_S) == len(c.their_S) > 0
        for ours, theirs in zip(c.our_S, c.their_S, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4, err_msg=c.case)
    assert tuple(seen) == CASES
    (pair,) = naive.pairs(architecture, rng)
    window, question = rng.integers(0, 61, (1, 12)), rng.integers(0, 61, (1, 7))
    states = [pair.theirs.consolidate(window, pair.theirs.fresh(), n) for n in (1, 2)]
    logits = [pair.theirs.forward(question, s)[0] for s in (pair.theirs.fresh(), *states)]
    assert min(np.abs(logits[a] - logits[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 1e-3
