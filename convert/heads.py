"""Heads of a sleep layer of delta attention: the host's, or as many channels in other heads."""

from __future__ import annotations

from ..utils import limits
from ..utils.errors import UserError


def heads_of(
    host: tuple[int, int], heads: int | None, head_dim: int | None, copy: bool = True
) -> dict[str, int]:
    """num_heads and head_dim, of which either, both or none is given.

    host  (heads, their size) of the attention at the layer's place: the default, and where only
          one is given the channels of both together stay as many
    copy  the layer is to start as that attention, so its channels must be as many

    The fast weights S of a layer are num_heads * head_dim^2 numbers: of the same projections, fewer
    and wider heads have the larger memory. UserError where the channels don't divide, or differ.
    """
    width = host[0] * host[1]
    given = heads or head_dim
    if given and not (heads and head_dim) and width % given:
        kind = f"{heads} heads" if heads else f"heads of {head_dim}"
        raise UserError(f"{width} channels can't be {kind}; give a divisor of {width}")
    limits.check("the number of a layer's channels", (heads or 1) * (head_dim or 1), limits.WIDTH)
    heads, head_dim = (
        heads or (width // head_dim if head_dim else host[0]),
        head_dim or (width // heads if heads else host[1]),
    )
    if copy and heads * head_dim != width:
        raise UserError(
            f"{heads} heads of {head_dim} can't start as attention of {host[0]} heads of {host[1]}:"
            f" together they must be {width}, or start with --init random"
        )
    return {"num_heads": heads, "head_dim": head_dim}
