"""What the kernel tests share: when they can run, and in which order the threads do."""

from __future__ import annotations

import mlx_sleep  # before MLX, for its BLAS  # isort: skip

import mlx.core as mx
import pytest

from mlx_sleep.kernels import harness

assert mlx_sleep  # imported for its effect


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: runs Metal kernels, on a GPU or in the harness")


def pytest_collection_modifyitems(items):
    if mx.metal.is_available() or harness.compiler() is not None:
        return
    skip = pytest.mark.skip(reason="neither Metal nor a C++ compiler: install g++ or clang++")
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(skip)


@pytest.fixture(params=(0, -1, 4321), ids=("forward", "backward", "random"))
def order(request):
    """The order in which threads run. Has no effect on a GPU."""
    with harness.launches(request.param):
        yield request.param
