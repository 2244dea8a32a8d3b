"""Judging what an op may run on: on random inputs, against the float32 definition on the CPU.

That takes a fraction of a second for each shape, so it belongs where nobody waits for a reply.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import mlx.core as mx
import numpy as np

from ..utils.files import one_line
from . import conv, gated_delta, mixers, ssd
from .paths import MIXERS, by_verdict, candidates, forcing
from .verdicts import Result, Shape, Trial, Verdict, judge, verdicts

OPS: dict[str, Callable[..., Any]] = {
    "gated_delta": gated_delta.gated_delta,
    "ssd": ssd.ssd,
    "short_conv": conv.short_conv,
    "dynamic_conv": conv.dynamic_conv,
    "gated_delta_net": mixers.gated_delta_net,
    "mamba2": mixers.mamba2,
    "delta_attention": mixers.delta_attention,
}
DEFINITIONS = {**OPS, "gated_delta": gated_delta.gated_delta_naive, "ssd": ssd.ssd_naive}
"""One token after the other; of convolutions and mixers the path on arrays, in float32."""

RULE = {
    "q": ("B", "T", "Hk", "Dk"),
    "k": ("B", "T", "Hk", "Dk"),
    "v": ("B", "T", "Hv", "Dv"),
    "g": ("B", "T", "Hv"),
    "beta": ("B", "T", "Hv"),
    "state": ("B", "Hv", "Dv", "Dk"),
}
ARRAYS: dict[str, dict[str, tuple[str, ...]]] = {
    "gated_delta": RULE,
    "ssd": {**RULE, "D": ("Hv",)},  # D or not: the number of dtypes tells
    "short_conv": {"x": ("B", "T", "C"), "weight": ("C", "K"), "conv": ("B", "K-1", "C")},
    "dynamic_conv": {
        "x": ("B", "T", "C"),
        "weight": ("B", "T", "C", "K"),
        "conv": ("B", "K-1", "C"),
    },
    "gated_delta_net": {
        "qkv": ("B", "T", "channels"),
        "z": ("B", "T", "Hv", "Dv"),
        "ba": ("B", "T", "2Hv"),
        "conv": ("B", "K-1", "channels"),
        "weight": ("channels", "K"),
        "A_log": ("Hv",),
        "dt_bias": ("Hv",),
        "norm_weight": ("Dv",),
        "state": ("B", "Hv", "Dv", "Dk"),
    },
    "mamba2": {
        "xBC": ("B", "T", "channels"),
        "dt": ("B", "T", "Hv"),
        "conv": ("B", "K-1", "channels"),
        "weight": ("channels", "K"),
        "conv_bias": ("channels",),
        "A_log": ("Hv",),
        "dt_bias": ("Hv",),
        "D": ("Hv",),
        "state": ("B", "Hv", "Dv", "Dk"),
    },
    "delta_attention": {
        "q": ("B", "T", "HvDv"),
        "k": ("B", "T", "HvDv"),
        "v": ("B", "T", "HvDv"),
        "z": ("B", "T", "Hv", "Dv"),
        "a": ("B", "T", "Hv"),
        "b": ("B", "T", "Hv"),
        "conv": ("B", "K-1", "channels"),
        "weight": ("channels", "K"),
        "dt_bias": ("Hv",),
        "norm_weight": ("Dv",),
        "state": ("B", "Hv", "Dv", "Dk"),
    },
}
"""The arrays of each op, in the order of its arguments."""

# (B, T, whether the last row is padded): lengths that are no multiple of any chunk.
PROOFS = {
    "token": [(1, 1, False), (3, 1, False)],
    "prompt": [(1, 2, False), (1, 75, False), (2, 41, True)],
    "gradient": [(1, 41, False), (2, 19, True)],
}
TIMED = {"token": (1, 1, False), "prompt": (1, 256, False), "gradient": (1, 128, False)}

ROUNDING = {mx.float16: 2**-11, mx.bfloat16: 2**-8}


def tolerance(shape: Shape) -> float:
    """Largest error of a right result, relative to the largest entry of its array.

    1e-4 in float32. The rules compute in float32 and round once: with 16-bit arrays two roundings
    are allowed, 0.8% in bfloat16 and 0.1% in float16. Convolutions and mixers on arrays round
    after every operation: eight, 3.1% and 0.4%.
    """
    rounding = max(ROUNDING.get(dtype, 0.0) for dtype in shape.dtypes)
    return max(1e-4, (2 if shape.op in ("gated_delta", "ssd") else 8) * rounding)


def calibrate(
    shapes: Collection[Shape], should_stop: Callable[[], bool] = lambda: False, again: bool = False
) -> None:
    """Judges those of the shapes that have no verdict yet, or all of them `again`.

    should_stop() is asked before each. Does nothing where verdicts don't decide (`by_verdict`).
    """
    if not by_verdict():
        return
    kept = verdicts()
    # A mixer on arrays runs the ops: theirs first.
    for shape in sorted(shapes, key=lambda s: (s.op in MIXERS, str(s))):
        if not again and kept.get(shape):
            continue
        if should_stop():
            return
        # Should the GPU take the process down, the next one finds this and does not try again.
        possible = candidates(shape)
        kept.put(shape, Verdict(possible[-1]))
        try:
            verdict = judge(trial_of(shape))
        except Exception as error:  # no trial, no conversation lost
            reason = Result(barred=one_line(error))
            verdict = Verdict(possible[-1], dict.fromkeys(possible, reason))
        except BaseException:
            kept.drop(shape)
            raise
        kept.put(shape, verdict)


def trial_of(shape: Shape) -> Trial:
    """Random inputs for the shape, what the definition makes of them, and what may be taken."""
    rng = np.random.default_rng(0)
    cases = []
    for size in PROOFS[shape.use]:
        case = _draw(shape, rng, *size)
        with mx.stream(mx.cpu):
            cases.append((case, [np.array(x) for x in _definition(shape, *case)]))
    return Trial(
        forms={path: _form(shape, path) for path in candidates(shape)},
        cases=cases,
        timed=_draw(shape, rng, *TIMED[shape.use]),
        feed=lambda case, results: _feed(shape, case, results),
        tolerance=tolerance(shape),
    )


def _form(shape: Shape, path: str):
    """The op on one path, or its gradient; other ops that it calls run as ever."""

    def form(case):
        with forcing(lambda asked: path if asked[:2] == shape[:2] else None):
            return _results(OPS, shape, *case)

    return form


def _definition(shape: Shape, arrays, mask):
    with forcing(lambda asked: candidates(asked)[-1]):
        arrays = [x.astype(mx.float32) for x in arrays]
        return _results(DEFINITIONS, shape, arrays, mask)


def _results(ops: dict[str, Callable[..., Any]], shape: Shape, arrays, mask):
    """What is compared: the op's results, or the gradients. Nothing depends on padding's output."""

    def op(*inputs):
        o, *states = _call(ops, shape, inputs, mask)
        if mask is not None:
            o = mx.where(mask.reshape(*mask.shape, *[1] * (o.ndim - 2)), o, 0)
        return [o, *states]

    if shape.use != "gradient":
        return op(*arrays)
    inputs, cotangents = arrays[: len(shape.dtypes)], arrays[len(shape.dtypes) :]
    return mx.vjp(op, inputs, cotangents)[1]


def _call(ops: dict[str, Callable[..., Any]], shape: Shape, inputs, mask):
    op, (Hk, _, Dk) = ops[shape.op], (*shape.sizes, 0)[:3]
    if shape.op == "ssd":
        return op(*inputs[:6], mask, *inputs[6:])
    if shape.op == "gated_delta_net":
        return op(*inputs[:-1], 1e-6, inputs[-1], Hk, mask)
    if shape.op == "delta_attention":
        return op(*inputs[:-1], 1e-6, inputs[-1], mask)
    if shape.op == "mamba2":
        return op(*inputs, Hk, Dk, mask=mask)
    return op(*inputs, mask)


def _draw(shape: Shape, rng: np.random.Generator, B: int, T: int, padded: bool) -> tuple[Any, Any]:
    """([*inputs, of a gradient *cotangents], mask)"""
    names = {"B": B, "T": T}
    if shape.op.endswith("conv"):
        names["C"], K = shape.sizes
    else:
        Hk, Hv, Dk, Dv, *rest = shape.sizes
        K = rest[0] if rest else 0
        names |= {"Hk": Hk, "Hv": Hv, "Dk": Dk, "Dv": Dv}
        names |= {"2Hv": 2 * Hv, "channels": 2 * Hk * Dk + Hv * Dv, "HvDv": Hv * Dv}
    names |= {"K": K, "K-1": K - 1}
    sizes = {name: [names[n] for n in letters] for name, letters in ARRAYS[shape.op].items()}
    arrays = [
        mx.array(_random(name, size, rng)).astype(dtype)
        for (name, size), dtype in zip(sizes.items(), shape.dtypes, strict=False)
    ]
    mask = mx.arange(T) < mx.array([[T]] * (B - 1) + [[T - 7]]) if padded else None
    if shape.use == "gradient":  # of the output and of the state
        of = ("v", "state") if "v" in sizes else ("x", "conv")
        like = dict(zip(sizes, arrays, strict=False))
        arrays += [mx.array(_random("", sizes[n], rng)).astype(like[n].dtype) for n in of]
    mx.eval(arrays, mask)
    return arrays, mask


def _random(name: str, size: list[int], rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(size, np.float32)
    if name in ("q", "k"):  # as models make them: longer keys let the delta rule grow
        return x / np.linalg.norm(x, axis=-1, keepdims=True)
    if name == "g":  # tokens that forget little, and a few that forget all
        return np.where(x > 1.5, -30, -0.1 * x**2)
    if name == "beta":
        return np.abs(np.tanh(x))
    if name == "A_log":
        return np.abs(x)
    return x - 3 if name == "dt_bias" else x


def _feed(shape: Shape, case, results):
    """The case with the states that a run left in the place of those that it began with."""
    arrays, mask = case
    names = list(ARRAYS[shape.op])
    arrays = list(arrays)
    states = [i for i, name in enumerate(names) if name in ("conv", "state")]
    if shape.use == "gradient":
        pairs = [(len(arrays) - 1, results[states[-1]])]
    else:
        pairs = list(zip(states, results[1:], strict=True))
    for i, x in pairs:
        arrays[i] = x.astype(arrays[i].dtype)
    return arrays, mask
