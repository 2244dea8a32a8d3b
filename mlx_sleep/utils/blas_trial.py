"""Is the BLAS that is loaded here right, and how fast is it? `python -m mlx_sleep.utils.blas_trial`

`blas_choice` runs this in a process for each BLAS, since a process can have only one and a wrong
one may crash it. It prints one line of JSON: the fields of `Blas`, `error` and `gflops` by size.
"""

from __future__ import annotations

import dataclasses
import json
import time

SIZES = {
    "1024x1024x1024": (1, 1024, 1024, 1024),
    "512x576x1536": (1, 512, 576, 1536),  # a projection in SmolLM2
    "256 of 32x64x64": (256, 32, 64, 64),  # chunks of the gated delta rule
    "256 of 32x32x32": (256, 32, 32, 32),
    "1x1024x4096": (1, 1, 1024, 4096),  # a token
}
"""[batch, m, k] @ [batch, k, n], such as fast weights and chat ask for, by their printed names."""

SECONDS = 0.04  # of timing for each size


def trial() -> dict:
    import mlx.core as mx

    from .. import BLAS

    with mx.stream(mx.cpu):
        error = max(largest_errors())
        speeds = {name: _gflops(*size) for name, size in SIZES.items()}
    return {**dataclasses.asdict(BLAS), "error": error, "gflops": speeds}


def largest_errors():
    """Largest errors relative to the largest entry, of what MLX asks of a BLAS and LAPACK.

    float32 against NumPy in float64, with odd sizes, transposed and batched; NaN counts as 1.
    float64 and complex64 count as float32 does, so does an inverse.
    """
    import mlx.core as mx
    import numpy as np

    rng = np.random.default_rng()
    odd = (1, 33, 127, 65), (3, 7, 129, 31), (1, 1, 300, 1)
    for batch, m, k, n in (*SIZES.values(), *odd):
        a, b = rng.standard_normal((batch, m, k)), rng.standard_normal((batch, k, n))
        exact = a @ b
        a, b = (mx.array(x.astype(np.float32)) for x in (a, b))
        a_t, b_t = (mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in (a, b))
        for x, y in ((a, b_t), (a, b), (a_t, b), (a_t, b_t))[: 4 if m % 2 else 1]:
            yield _error(np.array(x @ y), exact)
    a = rng.standard_normal((65, 65)) + 10 * np.eye(65)
    double = mx.array(a, mx.float64)
    yield _error(np.array(double @ double), a @ a)
    turned = mx.array((a + 1j * a.T).astype(np.complex64))
    yield _error(np.array(turned @ turned), (a + 1j * a.T) @ (a + 1j * a.T))
    yield _error(np.array(mx.linalg.inv(mx.array(a, mx.float32))), np.linalg.inv(a))


def _error(found, exact) -> float:
    error = float(abs(found - exact).max() / abs(exact).max())
    return error if error < 1 else 1.0  # NaN too, which JSON has not


def _gflops(batch: int, m: int, k: int, n: int) -> float:
    """Of the best of some products; the first one warms up."""
    import mlx.core as mx

    a, b = mx.random.normal((batch, m, k)), mx.random.normal((batch, k, n))
    mx.eval(a @ b)
    times: list[float] = []
    while len(times) < 2 or sum(times) < SECONDS:
        start = time.perf_counter()
        mx.eval(a @ b)
        times.append(time.perf_counter() - start)
    return 2 * batch * m * k * n / min(times) / 1e9


if __name__ == "__main__":
    print(json.dumps(trial()))
