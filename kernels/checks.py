"""What the ops and the launchers of kernels demand of their inputs: ranks, sizes, types."""

from __future__ import annotations

import mlx.core as mx

FLOATS = (mx.float32, mx.float16, mx.bfloat16)  # what the kernels take


def check(what: str, dtypes=FLOATS, **arrays) -> dict[str, int]:
    """The size of each letter, which is the same in all arrays.

    Each array comes as NAME=(array or None, sizes), a size being a number or a letter: q=(q,
    ("B", "T", "Hk", "Dk")). `mask` must be bool and the others of one of `dtypes` (None: of any).
    ValueError, one line that begins with `what`, for the first array that doesn't fit.
    """
    sizes: dict[str, int] = {}
    for name, (x, expected) in arrays.items():
        if x is None:
            continue
        shape = tuple(x.shape)
        fits = len(shape) == len(expected) and all(
            (sizes.setdefault(size, n) if isinstance(size, str) else size) == n
            for size, n in zip(expected, shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{n} = {sizes[n]}" if n in sizes else str(n) for n in expected)
            raise ValueError(f"{what}: {name} must be [{known}], not {list(shape)}")
        if name == "mask":
            if x.dtype != mx.bool_:
                raise ValueError(f"{what}: mask must be bool, not {_name(x.dtype)}")
        elif dtypes is not None and x.dtype not in dtypes:
            names = ", ".join(map(_name, dtypes))
            raise ValueError(f"{what}: {name} must be one of {names}, not {_name(x.dtype)}")
    return sizes


def check_rule(what: str, q, k, v, g, beta, state=None, mask=None, dtypes=None, **more) -> None:
    """`check` of a fast-weight rule's inputs, shaped as in ops/gated_delta.py, and of `more`."""
    sizes = check(
        what,
        dtypes,
        q=(q, ("B", "T", "Hk", "Dk")),
        k=(k, ("B", "T", "Hk", "Dk")),
        v=(v, ("B", "T", "Hv", "Dv")),
        g=(g, ("B", "T", "Hv")),
        beta=(beta, ("B", "T", "Hv")),
        state=(state, ("B", "Hv", "Dv", "Dk")),
        mask=(mask, ("B", "T")),
        **more,
    )
    check_groups(what, sizes["Hk"], sizes["Hv"])


def check_groups(what: str, Hk: int, Hv: int) -> None:
    """Heads of v must share out evenly among those of k."""
    if Hv and (Hk < 1 or Hv % Hk):
        raise ValueError(f"{what}: Hv must be a multiple of Hk; they are {Hv} and {Hk}")


def supported(Dk: int, Dv: int) -> bool:
    """Whether the kernels take heads of these sizes: multiples of 8 from 32 to 256."""
    return all(32 <= d <= 256 and d % 8 == 0 for d in (Dk, Dv))


def check_heads(what: str, Dk: int, Dv: int) -> None:
    """Heads must be `supported`."""
    if not supported(Dk, Dv):
        raise ValueError(
            f"{what} take Dk and Dv that are multiples of 8 from 32 to 256, not {Dk} and {Dv}"
        )


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
