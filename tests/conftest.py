"""What the tests share: one tree, random numbers, and how kernels run."""

from __future__ import annotations

import mlx_sleep  # before MLX, for its BLAS  # isort: skip

import io
import os
import secrets
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings

from mlx_sleep.cli import main
from mlx_sleep.kernels import source
from mlx_sleep.memory import Memory
from mlx_sleep.ops import verdicts
from tests.metal import harness

assert mlx_sleep  # imported for its effect
source.without_metal = harness.metal_kernel
if mx.metal.is_available():  # what tests measure is not for the user
    verdicts.verdicts_file = lambda: Path(os.environ["MLX_SLEEP_HOME"]) / "verdicts.json"


ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    group = parser.getgroup("random numbers")
    group.addoption("--seed", type=int, default=0, help="of every test's random numbers (0)")
    group.addoption("--fresh-seed", action="store_true", help="draw --seed, and print it")


def pytest_configure(config):
    # Nobody's memories and models are found, in this process or in those that tests start.
    os.environ["MLX_SLEEP_HOME"] = tempfile.mkdtemp(prefix="mlx-sleep-tests-")
    os.environ["MLX_SLEEP_CONFIG"] = os.path.join(os.environ["MLX_SLEEP_HOME"], "config.toml")
    config.addinivalue_line("markers", "kernels: runs Metal kernels, on a GPU or in the harness")
    config.addinivalue_line("markers", "slow: takes seconds, or is in a file that does")
    _check_tree()
    if config.option.fresh_seed:
        config.option.seed = secrets.randbits(32)
    else:
        settings.register_profile("fixed", derandomize=True)
        settings.load_profile("fixed")


def _check_tree():
    """Refuse to test two trees at once: `convert` and `kernels` come from wherever the
    environment's editable install points, the rest from the folder that pytest started in."""
    for name, place in (("", "mlx_sleep"), (".convert", "convert"), (".kernels", "kernels")):
        file = Path(find_spec("mlx_sleep" + name).origin).resolve()
        if file.parent != ROOT / place:
            pytest.exit(f"mlx_sleep{name} comes from {file.parent}; run pip install -e {ROOT}", 4)


def pytest_unconfigure():
    shutil.rmtree(os.environ["MLX_SLEEP_HOME"], ignore_errors=True)


def pytest_report_header(config):
    return f"random numbers: --seed {config.option.seed}"


# Files that start PyTorch, a terminal, processes or a build: more than half of the suite's time.
SLOW = (
    "test_bench_train",
    "test_cli_chat",
    "test_cli_terminal",
    "test_convert_torch",
    "test_examples",
    "test_memory_crash",
    "test_packaging",
    "test_parity_",
    "test_server",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)
    if mx.metal.is_available() or harness.compiler() is not None:
        return
    skip = pytest.mark.skip(reason="neither Metal nor a C++ compiler: install g++ or clang++")
    for item in items:
        if item.get_closest_marker("kernels"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def rng(request):
    """NumPy's and MLX's random numbers, the same in every test and run unless --seed says other."""
    seed = request.config.option.seed
    request.node.add_report_section("setup", "random numbers", f"--seed {seed}")
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


@pytest.fixture
def memory(tmp_path):
    """A memory without content, for a session."""
    with Memory.open("test", "fingerprint", home=tmp_path) as memory:
        yield memory
