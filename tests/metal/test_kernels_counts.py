"""What prefill and backward ask of a GPU, as the harness counts it, and what their grids are."""

from __future__ import annotations

import mlx_sleep  # isort: skip  (OpenBLAS before MLX)
import itertools

import mlx.core as mx
import pytest

from mlx_sleep.kernels import gated_delta, ssd
from mlx_sleep.kernels.chunks import backward_grid, prefill_grid
from mlx_sleep.lab.bench.kernels import backward_inputs, rule_inputs

from . import harness

assert mlx_sleep  # imported for its effect
counted = pytest.mark.skipif(mx.metal.is_available(), reason="only the harness counts")
KERNELS = {"gated_delta": gated_delta, "ssd": ssd}
SIZES = (32, 64, 96, 128, 192, 256)
SHAPES = list(itertools.product(SIZES, SIZES))
REGISTERS = 64  # of 128, which S or dS may take


def launched(run, inputs) -> list[dict[str, int]]:
    with harness.launches() as launches:
        mx.eval(run(*inputs))
    return [launch.counts for launch in launches]


@counted
@pytest.mark.parametrize(
    "Dk, Dv, blocks, loads",
    (
        (128, 128, 1, 0.6),
        (96, 256, 2, 0.6),
        (64, 64, 1, 0.62),
        (64, 32, 1, 0.72),
        (192, 64, 1, 0.67),
    ),
)
@pytest.mark.parametrize("rule", KERNELS)
def test_prefill(rule, Dk, Dv, blocks, loads):
    """Each block reads q, k, g and beta; all else is read or written once. Three barriers a chunk,
    and 0.6 operands from memory a matrix product, but for the smallest heads and for wide keys."""
    T, C = 64, 16 if Dk <= 128 else 8
    inputs = rule_inputs(T, Dk, Dv)
    (counts,) = launched(KERNELS[rule].prefill, inputs)
    *_, state = inputs
    q, k, v, g, beta, S = (4 * x.size for x in inputs)
    assert counts["device_read"] == blocks * (q + k + g + beta) + v + S
    assert counts["device_written"] == v + S
    assert counts["threadgroup_memory"] <= 32 << 10
    assert counts["barriers"] == 3 * blocks * T // C
    operands = counts["matrix_loads"] - state.nbytes // 256  # which S was at first
    assert operands <= loads * counts["matrix_products"]


@counted
@pytest.mark.parametrize("rule", KERNELS)
def test_backward(rule):
    """Neither S nor dS goes to memory and back in every chunk."""
    T, D = 64, 128
    inputs = backward_inputs(T, D, D)
    first, second = launched(KERNELS[rule].backward, inputs)
    token = 4 * D  # bytes of q, k, v, o or a gradient
    state = 4 * D * D
    solved = token if rule == "gated_delta" else 0
    gates = 2 * 4
    assert first["device_read"] == T * (2 * token + gates) + state
    kept = T // 32 * state + (T * solved or state)
    assert first["device_written"] == kept
    # k twice, once transposed; S once a chunk; of every second chunk k and, by each of 8 SIMD
    # groups, v again, and the gates.
    again = T // 2 * (token + 8 * token + gates)
    assert second["device_read"] == T * (5 * token + gates) + T // 16 * state + again + state
    assert second["device_written"] == T * (3 * token + gates) + state + 4 * (rule == "ssd")
    assert second["threadgroup_memory"] <= 32 << 10


@pytest.mark.parametrize("Dk, Dv", SHAPES + [(40, 136), (136, 40), (104, 88), (248, 232)])
def test_grids_cover_the_head_and_fit_a_gpu(Dk, Dv):
    """At most 256 threads with at most half of their registers for S, and no block to spare."""
    prefill = prefill_grid(Dk, Dv)
    width = 8 * prefill["Tiles"] * prefill["Bands"]
    keys = -(-Dk // 8 // prefill["Parts"])
    assert 2 * keys * prefill["Tiles"] <= REGISTERS
    assert prefill["Bands"] * prefill["Parts"] <= 8
    assert prefill["Tiles"] >= 2
    fits = 8 * 8 // prefill["Parts"] * min(32 // keys, 4)  # of Dv, in one threadgroup
    assert -(-Dv // width) == -(-Dv // fits)
    backward = backward_grid(Dk, Dv)
    assert 2 * (backward["BV"] // 8) * backward["Tiles"] <= REGISTERS
    assert backward["Groups"] <= 8 and 8 * backward["Groups"] * backward["Tiles"] >= Dk


def test_bytes_of_prefill_over_the_least():
    """1.3 at most where S of a head fits the registers of a threadgroup, or q and k are small
    beside v; what is missed is known."""
    ratios = {}
    for Dk, Dv in SHAPES:
        grid = prefill_grid(Dk, Dv)
        blocks = -(-Dv // (8 * grid["Tiles"] * grid["Bands"]))
        ratios[Dk, Dv] = (blocks * Dk + Dv) / (Dk + Dv)  # of long prompts, whose state is little
    small = {96: 128, 128: 128, 192: 64, 256: 64}  # the largest Dv of one block
    missed = {shape for shape, ratio in ratios.items() if ratio > 1.3}
    assert missed == {(Dk, Dv) for Dk, Dv in SHAPES if Dv > small.get(Dk, 256)} - {(96, 256)}
    assert max(ratios[shape] for shape in missed if shape[0] <= 128) <= 1.4
