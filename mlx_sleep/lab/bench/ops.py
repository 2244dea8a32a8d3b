"""The ops against MLX's and mlx-lm's own, on the same inputs (`mlx-sleep bench ops`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
from mlx_lm.models.gated_delta import gated_delta_kernel, gated_delta_ops
from mlx_lm.models.ssm import ssm_attn

from ...models.config import read_config
from ...models.load import EMBEDDED
from ...ops.gated_delta import gated_delta
from ...ops.ssd import ssd
from ...utils.errors import UserError
from ..statistics import ratio
from ..timing import clock, interleave

Shape = tuple[int, int, int, int, int]  # B, T, heads, Dk, Dv
SHAPES: tuple[Shape, ...] = ((1, 2048, 16, 128, 128), (1, 2048, 12, 96, 256))


def shapes() -> list[Shape]:
    """Two shapes of published models (Qwen3-Next's heads, Jet-Nemotron's) and the embedded one."""
    try:
        config = read_config(EMBEDDED)
        heads, Dk, Dv = (
            config[f"linear_{name}"]
            for name in ("num_value_heads", "key_head_dim", "value_head_dim")
        )
        return [*SHAPES, (1, config["sleep"]["window"], heads, Dk, Dv)]
    except (KeyError, UserError):  # this package has no model, or one of another kind
        return [*SHAPES, (1, 256, 4, 32, 32)]


def rows(repeats: int = 3, sizes: Sequence[Shape] | None = None) -> Iterator[dict]:
    """One row after the other, as they are measured.

    The gradient of a loop over 2048 steps needs about 10 GB.

    op         gated_delta or ssd
    shape      [B, T, heads, Dk, Dv]
    direction  forward, or forward_backward: the gradients of all inputs
    against    mlx.fast (gated_delta_update), or mlx-lm (what its models call)
    ratio      their time over ours; the median over rounds of ours, theirs, ours, theirs
    error      largest difference between the two, relative to the largest entry, of all arrays
    """
    for shape in sizes or shapes():
        for op, ours, against, theirs, inputs in _pairs(shape):
            for direction in ("forward", "forward_backward"):
                a, b = ours, theirs
                if direction == "forward_backward":
                    # mlx-lm's Metal kernel has no gradient: its models train by the array form.
                    b = gated_delta_lm if theirs is gated_delta_lm_fast else theirs
                    a, b = (_gradients(f, inputs) for f in (a, b))
                results = [f(*inputs) for f in (a, b)]
                error = max(_error(x, y) for x, y in zip(*results, strict=True))
                del results
                times = interleave([clock(f, *inputs) for f in (a, b)], repeats)
                # A loop over 2048 steps keeps gigabytes for its gradient, and MLX what it frees.
                mx.clear_cache()
                yield {
                    "op": op,
                    "shape": list(shape),
                    "direction": direction,
                    "against": against,
                    "ratio": ratio(times[1], times[0]),
                    "error": error,
                }


def plot(rows: list[dict], axes) -> None:
    """A bar for each row: how many times faster than theirs."""
    names = [
        f"{r['op']} {'x'.join(map(str, r['shape']))}\n{r['direction']}, {r['against']}"
        for r in rows
    ]
    axes.barh(names, [r["ratio"] for r in rows])
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("their time over ours")


def gated_delta_fast(q, k, v, g, beta):
    """MLX's op; it takes the decay itself where ours takes its log."""
    return mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta)


def gated_delta_lm(q, k, v, g, beta):
    """mlx-lm's array form, a loop over time."""
    return gated_delta_ops(q, k, v, mx.exp(g), beta)


def gated_delta_lm_fast(q, k, v, g, beta):
    """What mlx-lm runs: its Metal kernel where there is Metal and Dk fits, else the array form."""
    if not mx.metal.is_available() or mx.default_device() != mx.gpu or k.shape[-1] % 32:
        return gated_delta_lm(q, k, v, g, beta)
    state = mx.zeros((v.shape[0], v.shape[2], v.shape[3], k.shape[3]))
    return gated_delta_kernel(q, k, v, mx.exp(g), beta, state)


def ssd_ours(q, k, v, dt):
    """Mamba-2 with A = -1 in every head."""
    dt = mx.logaddexp(dt, 0)  # mlx-lm's function takes it before the softplus
    return ssd(q, k, v, -dt, dt)


def ssd_lm(q, k, v, dt):
    """mlx-lm's prefill of Mamba-2 on the same."""
    zero = mx.zeros(v.shape[2])
    return ssm_attn(v, zero, k, q, zero, dt, zero, time_step_limit=(0.0, float("inf")))


def _pairs(shape: Shape):
    B, T, H, Dk, Dv = shape
    q, k = (mx.random.normal((B, T, H, Dk)) for _ in range(2))
    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    v = mx.random.normal((B, T, H, Dv))
    g = -0.1 * mx.random.uniform(shape=(B, T, H))
    beta = mx.random.uniform(shape=(B, T, H))
    dt = mx.random.uniform(-5, 0, (B, T, H))
    mx.eval(q, k, v, g, beta, dt)
    inputs = q, k, v, g, beta
    yield "gated_delta", gated_delta, "mlx.fast", gated_delta_fast, inputs
    yield "gated_delta", gated_delta, "mlx-lm", gated_delta_lm_fast, inputs
    yield "ssd", ssd_ours, "mlx-lm", ssd_lm, (q, k, v, dt)


def _gradients(op, inputs):
    """The gradients in all inputs of a loss that looks at o and at the final state."""

    def loss(*args):
        o, state = op(*args)
        return mx.square(o).sum() + mx.square(state).sum()

    return mx.grad(loss, argnums=range(len(inputs)))


def _error(x: mx.array, y: mx.array) -> float:
    return float(mx.abs(x - y).max() / mx.abs(y).max())
