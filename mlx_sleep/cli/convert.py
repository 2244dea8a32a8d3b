"""`mlx-sleep convert`: a model folder in another number type, or with other sleep settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    source: Annotated[Path, typer.Argument(help="The model folder to read.")],
    dest: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="Quantize weights.")] = False,
    q_bits: Annotated[int, typer.Option(help="Bits a quantized weight: 4 or 8.")] = 4,
    q_group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64.")] = 64,
    dtype: Annotated[
        str | None,
        typer.Option(help="float16, bfloat16 or float32, for weights that are not quantized."),
    ] = None,
    passes: Annotated[int | None, typer.Option(help="Passes of a sleep.")] = None,
    window: Annotated[int | None, typer.Option(help="Window in tokens.")] = None,
    eviction: Annotated[
        str | None,
        typer.Option(help="What a sleep leaves of the KV cache: hard (nothing) or sliding."),
    ] = None,
):
    """Copy a model folder: quantized, in another number type, or with other sleep settings.

    Fast weights are float32 in every copy. Checkpoints of other families come later.

    Example: mlx-sleep convert my-model my-model-4bit -q --q-bits 4
    """
    from ..convert.quantize import convert as run

    sleep = {"passes": passes, "window": window, "eviction": eviction}
    skipped = run(
        source,
        dest,
        bits=q_bits if quantize else None,
        group_size=q_group_size,
        dtype=dtype,
        sleep={name: value for name, value in sleep.items() if value is not None},
    )
    typer.echo(f"wrote {dest}")
    if skipped:
        typer.echo(
            f"not quantized, groups of {q_group_size} do not divide their inputs: "
            + ", ".join(skipped)
        )
