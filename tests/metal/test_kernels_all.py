"""Every kernel in the folder is run and checked: a new file without a check fails here."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
from importlib import resources

import mlx.core as mx
import pytest

from mlx_sleep.kernels import source

from . import harness
from .kernel_checks import CHECKS

assert mlx_sleep  # imported for its effect


def kernels() -> list[str]:
    files = resources.files("mlx_sleep.kernels").iterdir()
    names = [file.name for file in files if file.name.endswith(".metal")]
    return [kernel for name in sorted(names) for kernel in source.read(name)]


@pytest.mark.kernels
@pytest.mark.parametrize("name", kernels())
def test_kernel(name):
    with harness.launches() as launches:
        for check in CHECKS[name]:
            check()
    if not mx.metal.is_available():
        assert source.PREFIX + name in {launch.name for launch in launches}


def test_no_check_without_a_kernel():
    assert set(CHECKS) == set(kernels())
