"""Every kernel compiles for NVIDIA's GPUs, too. Running them there is for cuda_checks.py."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import functools

import mlx.core as mx
import pytest

from mlx_sleep.kernels import chunks, conv, delta_attention, gated_delta, source, ssd

from . import harness
from .harness import cuda
from .kernel_checks import CHECKS

assert mlx_sleep  # imported for its effect
pytestmark = pytest.mark.skipif(
    mx.metal.is_available() or cuda.compiler() is None, reason="no nvcc"
)


@pytest.mark.parametrize("name", CHECKS)
def test_it_compiles(monkeypatch, name):
    """With the template arguments of its first check; a launch does nothing and gives zeros."""
    compiled = []

    def launch(text, kernel, _buffers, results, _grid, _threadgroup):
        for x in results:
            x[...] = 0
        if kernel == name:
            compiled.append(cuda.library(text, "sm_90"))

    @functools.cache
    def kernel(file, kernel):
        known = source.read(file)[kernel]
        inputs = known.name, known.inputs, known.outputs, known.body, known.header
        return harness.metal_kernel(*inputs, wrap=cuda.wrap, launch=launch)

    for module in (chunks, conv, delta_attention, gated_delta, ssd):
        monkeypatch.setattr(module, "kernel", kernel)
    with pytest.raises(AssertionError):  # zeros are wrong
        CHECKS[name][0]()
    assert compiled


def test_a_kernel_that_does_not_compile():
    text = cuda.wrap("y[0] = undefined;", "", [("x", "float", (8,))], [("y", "float", (8,))], [])
    with pytest.raises(RuntimeError, match="(?s)does not compile.*undefined"):
        cuda.library(text, "sm_90")
