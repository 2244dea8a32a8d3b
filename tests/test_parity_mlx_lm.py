"""mlx-lm's models, wrapped, against transformers' PyTorch classes: logits, and S where it is.

Forward passes in one go, token by token and padded, sleeps of 1 to 3 passes, and a second window
after an eviction, through folders that transformers saved and the converter read.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests import parity

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", parity.TRANSFORMERS)

from safetensors.torch import save_file  # noqa: E402

from mlx_sleep.convert import pipeline  # noqa: E402
from mlx_sleep.convert.export import export  # noqa: E402
from mlx_sleep.models.load import load_model  # noqa: E402
from tests.parity import CASES, compared, mlx_lm  # noqa: E402
from tests.parity.configs import ATTENTION_ONLY  # noqa: E402

AWAKE = ("prefill", "steps", "padded")
HYBRIDS = [name for name in mlx_lm.CONFIGS if name not in ATTENTION_ONLY]


@pytest.fixture
def rng(rng):
    torch.manual_seed(int(rng.integers(2**31)))
    return rng


@pytest.mark.parametrize("architecture", mlx_lm.CONFIGS)
def test_parity(rng, architecture):
    seen = set()
    for pair, c in compared(mlx_lm, architecture, rng):
        seen.add(c.case)
        assert np.abs(c.theirs).max() > 0.3, "logits too small to tell models apart"
        np.testing.assert_allclose(c.ours, c.theirs, atol=1e-4, rtol=0, err_msg=c.case)
        assert len(c.our_S) == len(c.their_S)
        for ours, theirs in zip(c.our_S, c.their_S, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4, err_msg=c.case)
        assert pair.architecture == architecture
    assert seen == set(CASES if architecture in HYBRIDS else AWAKE)


@pytest.mark.parametrize("architecture", HYBRIDS)
def test_the_number_of_passes_shows(rng, architecture):
    """Another N, or no sleep, gives other logits: the comparison above would see the mistake."""
    theirs = mlx_lm.build(architecture, 0, rng).theirs
    window, question = rng.integers(0, 61, (1, 12)), rng.integers(0, 61, (1, 7))
    states = [theirs.fresh()]
    states += [theirs.consolidate(window, theirs.fresh(), n) for n in (1, 2, 3)]
    logits = [theirs.forward(question, state)[0].numpy() for state in states]
    for a in range(4):
        for b in range(a):
            assert np.abs(logits[a] - logits[b]).max() > 1e-3, (a, b)


@pytest.mark.parametrize(
    "architecture", ["qwen3_next", "olmo_hybrid", "nemotron_h", "granitemoehybrid"]
)
def test_a_state_dict_is_the_saved_checkpoint(rng, tmp_path, architecture):
    """Trainers write state_dicts, where transformers keeps experts and convolutions fused."""
    config, sleep = mlx_lm.CONFIGS[architecture][0]
    theirs = mlx_lm.reference(config, {"window": 9, **sleep})
    theirs.net.save_pretrained(tmp_path)
    saved = dict(tree_flatten(mlx_lm.converted(tmp_path, {}).parameters()))
    state = {name: x.contiguous() for name, x in theirs.net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = dict(tree_flatten(mlx_lm.converted(tmp_path, {}).parameters()))
    assert again.keys() == saved.keys()
    assert all(mx.array_equal(again[name], x) for name, x in saved.items())


@pytest.mark.parametrize("architecture", mlx_lm.CONFIGS)
def test_export_gives_the_checkpoint_again(rng, tmp_path, architecture):
    """transformers reads the same weights of it, and it becomes the same model once more."""
    config, sleep = mlx_lm.CONFIGS[architecture][0]
    theirs = mlx_lm.reference(config, {"window": 9, **sleep})
    mlx_lm._randomize(theirs.net, rng)
    theirs.net.save_pretrained(tmp_path / "theirs")
    pipeline.convert(tmp_path / "theirs", tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "again")
    again, info = type(theirs.net).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert all(x.shape == again.state_dict()[n].shape for n, x in theirs.net.state_dict().items())
    exact = not (architecture.startswith("qwen3_") or architecture == "falcon_h1")
    for name, x in theirs.net.state_dict().items():
        assert torch.allclose(x, again.state_dict()[name], atol=0 if exact else 1e-6), name
    pipeline.convert(tmp_path / "again", tmp_path / "twice")
    models = [load_model(tmp_path / name)[0] for name in ("ours", "twice")]
    once, twice = (dict(tree_flatten(model.parameters())) for model in models)
    assert all(mx.allclose(x, twice[n], atol=0 if exact else 1e-6) for n, x in once.items())
