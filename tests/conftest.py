"""What the tests share: random numbers; when kernels can run, and in which order the threads do."""

from __future__ import annotations

import mlx_sleep  # before MLX, for its BLAS  # isort: skip

import io
import os
import secrets
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_sleep.cli import main
from mlx_sleep.kernels import source
from tests.metal import harness

assert mlx_sleep  # imported for its effect
source.without_metal = harness.metal_kernel


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


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, standard output, standard error)."""

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "argv", ["mlx-sleep", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Runs a command that must fail with one line on standard error, and gives that line."""

    def refused(*arguments, stdin: bytes = b""):
        code, _, error = run(*arguments, stdin=stdin)
        assert code == 1 and error.startswith("error: ") and error.count("\n") == 1
        return error

    return refused
