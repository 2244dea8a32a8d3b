"""What is used of other packages beyond their documented interfaces is still there."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import mlx.nn as nn
import pytest

from mlx_sleep.models.compat import causal_lm_class, has_mlx_lm_model, mlx_lm_classes

TRIED = {
    "mlx-lm": ("0.31.2", "0.32.2"),
    "transformers": ("5.0.0", "5.24.0"),
}
"""Versions that this suite was run with, oldest and newest; before another series is allowed in
pyproject.toml, run it there and add it here. `verify` works with the oldest transformers; the
comparisons of tests/parity need `parity.TRANSFORMERS`."""


def series(name: str) -> tuple[int, ...]:
    """What may break: minor versions before 1.0, major ones after."""
    major, minor = map(int, name.split(".")[:2])
    return (major,) if major else (major, minor)


@pytest.mark.parametrize("package", TRIED)
def test_the_installed_version_is_of_a_series_that_was_tried(package):
    assert series(version(package)) in {series(tried) for tried in TRIED[package]}


@pytest.mark.parametrize("package", TRIED)
def test_no_series_is_allowed_that_was_not_tried(package):
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    lowest, end = re.search(rf'"{package}>=([\d.]+),<([\d.]+)"', text).groups()
    oldest, newest = TRIED[package]
    assert series(f"{lowest}.0") == series(oldest)
    after = series(newest)
    assert series(f"{end}.0") == (*after[:-1], after[-1] + 1)


def test_mlx_lm_finds_its_architectures():
    model, args = mlx_lm_classes({"model_type": "llama"})
    assert issubclass(model, nn.Module) and "hidden_size" in args.__dataclass_fields__
    assert mlx_lm_classes({"model_type": "mistral"}) == (model, args)  # remapped
    with pytest.raises(ValueError):
        mlx_lm_classes({"model_type": "none_such"})


def test_what_mlx_lm_has():
    assert has_mlx_lm_model("llama") and has_mlx_lm_model("mistral")
    for name in ("none_such", "cache", "os.path", "..utils", "", None, 7):
        assert not has_mlx_lm_model(name)


def test_transformers_names_the_class_of_a_config():
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert causal_lm_class(transformers.LlamaConfig()) is transformers.LlamaForCausalLM
    with pytest.raises(KeyError):
        causal_lm_class(transformers.CLIPConfig())
