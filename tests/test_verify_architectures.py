"""`convert --verify` of each architecture that transformers runs: it passes, and it can fail."""

from __future__ import annotations

import json

import pytest

from tests import parity

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", parity.TRANSFORMERS)

from mlx_sleep.convert import pipeline  # noqa: E402
from mlx_sleep.convert.verify import verify  # noqa: E402
from mlx_sleep.utils.errors import UserError  # noqa: E402
from tests.parity import mlx_lm  # noqa: E402


@pytest.mark.parametrize("architecture", mlx_lm.CONFIGS)
def test_verify(rng, tmp_path, architecture):
    config, sleep = mlx_lm.CONFIGS[architecture][0]
    theirs = mlx_lm.reference(config, {"window": 9, **sleep})
    mlx_lm._randomize(theirs.net, rng)
    theirs.net.save_pretrained(tmp_path / "theirs")
    pipeline.convert(tmp_path / "theirs", tmp_path / "ours")
    found = verify(tmp_path / "theirs", tmp_path / "ours")
    assert found.reference and "transformers" in found.reference, found.why
    assert found.greedy_agreement == 1.0

    # The same folder as the result of a checkpoint whose RoPE or norms differ is not accepted.
    file = tmp_path / "ours" / "config.json"
    ours = json.loads(file.read_text())
    for name in ("rms_norm_eps", "layer_norm_epsilon", "norm_eps"):
        if name in ours:
            ours[name] = 0.5
    file.write_text(json.dumps(ours))
    with pytest.raises(UserError, match="the config is taken otherwise|differs most"):
        verify(tmp_path / "theirs", tmp_path / "ours")
