"""What the tests share: random numbers; when kernels can run, and in which order the threads do."""

from __future__ import annotations

import mlx_sleep  # before MLX, for its BLAS  # isort: skip

import os
import secrets

import mlx.core as mx
import numpy as np
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


@pytest.fixture(autouse=True)
def rng(request):
    """Fresh numbers for every test, MLX's too; a failed test says how to draw the same again."""
    seed = int(os.environ.get("MLX_SLEEP_TEST_SEED") or secrets.randbits(32))
    request.node.add_report_section("setup", "random numbers", f"MLX_SLEEP_TEST_SEED={seed}")
    mx.random.seed(seed)
    return np.random.default_rng(seed)


@pytest.fixture(params=(0, -1, 4321), ids=("forward", "backward", "random"))
def order(request):
    """The order in which threads run. Has no effect on a GPU."""
    with harness.launches(request.param):
        yield request.param
