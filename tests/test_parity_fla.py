"""fla_gated_deltanet and fla_mamba2 against PyTorch, over the options of their configs."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from tests import parity

pytest.importorskip("torch")
pytest.importorskip("transformers", parity.TRANSFORMERS)

from mlx_sleep.convert.pipeline import convert  # noqa: E402
from mlx_sleep.models.load import load_model  # noqa: E402
from tests.parity import fla  # noqa: E402


@pytest.mark.parametrize("name", fla.CONFIGS)
def test_parity(rng, name):
    pair = fla.build(name, rng)
    seen = []
    for c in parity.compare(pair, rng):
        seen.append(c.case)
        assert np.abs(c.theirs).max() > 0.5  # logits, not nothing
        np.testing.assert_allclose(c.ours, c.theirs, atol=1e-4, err_msg=c.case)
        assert c.their_S and len(c.our_S) == len(c.their_S)
        for a, b in zip(c.our_S, c.their_S, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max(), err_msg=c.case)
    assert tuple(seen) == parity.CASES


def test_passes_make_a_difference():
    """The sleeps of 1, 2 and 3 passes would not agree with one another."""
    rng = np.random.default_rng(1)  # some weights converge within two passes
    pair = fla.build("delta", rng)
    S = {c.case: c.their_S for c in parity.compare(pair, rng)}
    for a, b in (("sleep_1", "sleep_2"), ("sleep_2", "sleep_3")):
        moved = [np.abs(x - y).max() / np.abs(y).max() for x, y in zip(S[a], S[b], strict=True)]
        assert max(moved) > 1e-2


def test_rows_of_the_table(monkeypatch):
    """The command's rows: the worst of all configs that share a reference."""
    few = ("delta", "delta, bare", "mamba, transformers")
    monkeypatch.setattr(fla, "CONFIGS", {name: fla.CONFIGS[name] for name in few})
    rows = [row for name in fla.ARCHITECTURES for row in parity.rows(fla, name)]
    assert {r.architecture for r in rows} == {"fla_gated_deltanet", "fla_mamba2"}
    for architecture in ("fla_gated_deltanet", "fla_mamba2"):
        assert [r.case for r in rows if r.architecture == architecture] == list(parity.CASES)
    assert all(0 < r.max_logit_error < 1e-4 and r.greedy_agreement > 0.98 for r in rows)


@pytest.mark.parametrize("name", ["delta", "mamba, transformers"])
def test_a_folder_through_the_converter(rng, tmp_path, name):
    """As PyTorch writes it to disk: config.json of the makers, their names, their shapes."""
    import torch
    from safetensors.torch import save_file

    pair = fla.build(name, rng)
    config, _ = fla.CONFIGS[name]
    net = getattr(pair.theirs, "net", pair.theirs)
    source = tmp_path / "source"
    if name.endswith("transformers"):
        net.save_pretrained(source)  # dt_limit's infinity in its own notation
    else:
        source.mkdir()
        (source / "config.json").write_text(json.dumps(config))
        save_file(net.state_dict(), source / "model.safetensors")
    convert(source, tmp_path / "ours")
    model, _ = load_model(tmp_path / "ours")
    x = rng.integers(0, 61, (2, 9))
    expected, _ = pair.theirs.forward(torch.as_tensor(x), pair.theirs.fresh())
    np.testing.assert_allclose(model(mx.array(x))[0], expected, atol=1e-4)
