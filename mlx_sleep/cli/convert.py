"""`mlx-sleep convert` and `export`: PyTorch checkpoints to model folders, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..utils.errors import UserError
from .model_names import choose
from .options import LocalFilesOnly, Numbers, Revision, numbers
from .output import count, line, note, progress_bar

if TYPE_CHECKING:  # it imports MLX
    from ..convert.pipeline import Report


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a weights file beside its config.json, a .gguf, a wheel with one, "
            "the id of a model on Hugging Face, smollm2, or an adapter's folder."
        ),
    ],
    dest: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="Quantize weights.")] = False,
    q_bits: Annotated[
        int | None, typer.Option(help="Bits a weight: 2, 3, 4 (if not given), 5, 6 or 8.")
    ] = None,
    q_group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale: 32, 64 (if not given) or 128."),
    ] = None,
    quant_predicate: Annotated[
        str | None,
        typer.Option(help="A mixture of bits: mixed_2_6, mixed_3_4, mixed_3_6 or mixed_4_6."),
    ] = None,
    q_layer: Annotated[
        list[str] | None,
        typer.Option(
            help="PATTERN=BITS for layers whose name has the pattern (a regular expression); "
            "BITS may be none. May be repeated; the first that fits counts."
        ),
    ] = None,
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
    loop_range: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--loop-range", least=0, example="7,21"),
            metavar="LO,HI",
            help="The blocks that a sleep loops over, HI not included.",
        ),
    ] = None,
    insert: Annotated[
        int | None, typer.Option(min=1, help="Add so many silent sleep layers, evenly spaced.")
    ] = None,
    insert_kind: Annotated[
        str | None,
        typer.Option(
            help="Their kind: jet (if not given), gated_deltanet, or delta_attention (a copy of "
            "the host's)."
        ),
    ] = None,
    insert_before: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--insert-before", least=0, example="2,6,10"),
            metavar="N,...",
            help="The blocks to insert them before, with commas.",
        ),
    ] = None,
    merge_adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Make a LoRA adapter of PEFT or mlx-lm part of the weights.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Compare the result with the source, with PyTorch where it is.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="List where each tensor comes from.")
    ] = False,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
):
    """Convert a checkpoint of PyTorch or llama.cpp, or another model folder, to a model folder.

    convert.json in the new folder lists where each tensor comes from. Fast weights are always
    float32.

    Example: mlx-sleep convert my-checkpoint my-model -q --q-bits 4
    """
    from ..convert import hub
    from ..convert.mapping import TensorError
    from ..convert.pipeline import convert as run
    from ..convert.quantize import NumberTypes
    from ..models.adapter import copy_adapter, is_adapter

    if not hub.is_id(source):
        _refuse({"--revision": revision}, "is for ids on Hugging Face")
        source = _named(source)
    if is_adapter(source):
        others: dict[str, Any] = {
            "--dtype": dtype,
            "--insert": insert,
            "--insert-before": insert_before,
        }
        others |= {"--passes": passes, "--window": window, "--loop-range": loop_range}
        others |= {"--q-group-size": q_group_size, "--quant-predicate": quant_predicate}
        others |= {"--insert-kind": insert_kind, "--q-layer": q_layer or None}
        others |= {"--eviction": eviction, "--verify": verify or None}
        others |= {"--merge-adapter": merge_adapter}
        _refuse(others, "is not for an adapter")
        if not quantize:
            _refuse({"--q-bits": q_bits}, "needs -q")
        copy_adapter(source, dest, bits=(q_bits or 8) if quantize else None)
        line(f"wrote the adapter {dest}")
        return
    if not quantize and quant_predicate is None:
        _refuse({"--q-bits": q_bits, "--q-group-size": q_group_size}, "needs -q")
    if quant_predicate is not None:
        _refuse({"--q-bits": q_bits}, "has no place beside --quant-predicate, which says the bits")
    if insert is None and insert_before is None:
        _refuse({"--insert-kind": insert_kind}, "needs --insert or --insert-before")
    if insert is not None and insert_before is not None:
        _refuse({"--insert": insert}, "has no place beside --insert-before, which says where")
    group_size = q_group_size or 64
    types = NumberTypes(
        bits=(q_bits or 4) if quantize and quant_predicate is None else None,
        group_size=group_size,
        recipe=quant_predicate,
        layers=tuple(map(_layer_choice, q_layer or ())),
        dtype=dtype,
    )
    sleep: dict[str, Any] = {"passes": passes, "window": window, "eviction": eviction}
    if loop_range is not None:
        sleep["loop_range"] = list(loop_range)
    inserted: dict[str, Any] | None = None
    if insert is not None or insert_before is not None:
        inserted = {"kind": insert_kind or "jet", "count": insert}
        if insert_before is not None:
            inserted["before"] = list(insert_before)
    try:
        with progress_bar("converting", unit="bytes") as on_bytes:
            report = run(
                source,
                dest,
                types,
                sleep={name: value for name, value in sleep.items() if value is not None},
                insert=inserted,
                merge_adapter=merge_adapter,
                on_bytes=on_bytes,
                revision=revision,
                local_files_only=local_files_only,
            )
    except TensorError as error:
        for detail in error.details:
            note(detail)
        raise
    _describe(report, dest, group_size, verbose)
    if verify:
        _verify(source, dest, revision=revision, local_files_only=local_files_only)


def export(
    source: Annotated[str, typer.Argument(help="The model folder to read.")],
    dest: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
):
    """Write a model folder as a PyTorch checkpoint: safetensors with PyTorch's names.

    Example: mlx-sleep export my-model my-checkpoint
    """
    from ..convert.export import export as run

    with progress_bar("exporting", unit="bytes") as on_bytes:
        names = run(_named(source), dest, on_bytes=on_bytes)
    line(f"wrote {dest}: {count(len(names), 'tensor')}")


def _named(source: str) -> str:
    """The folder that a name of --model stands for; any other source as it is."""
    from ..convert.downloads import DOWNLOADS
    from ..models.load import EMBEDDED

    if source not in ("embedded", *DOWNLOADS):
        return source
    return str(choose(source).path or EMBEDDED)


def _describe(report: Report, dest: Path, group_size: int, verbose: bool) -> None:
    for remark in report.notes:
        line(f"note: {remark}")
    if verbose:
        for row in report.tensors:
            shape = "x".join(map(str, row["shape"]))
            came = " + ".join(row["from"]) or "nothing"
            line(f"{row['name']} {row['dtype']} {shape}: {row['how']}, from {came}")
    for name, why in report.dropped.items():
        line(f"left out: {name} ({why})")
    line(f"wrote {dest}: {report.architecture}, {count(len(report.tensors), 'tensor')}")
    if report.skipped:
        line(
            f"not quantized, groups of {group_size} do not divide their inputs: "
            + ", ".join(report.skipped)
        )


def _verify(source: str, dest: Path, **where: Any) -> None:
    from ..convert.verify import TOKENS, verify

    found = verify(source, dest, **where)
    line(
        f"verified: {count(found.same_bytes, 'tensor')} with the source's bytes, "
        f"{found.rewritten:,} cast or computed, all as they were written"
    )
    if found.reference is None:
        line(f"no logits were compared: {found.why}")
    else:
        bound = "none: quantized" if found.bound is None else f"{found.bound:.1e}"
        line(
            f"against {found.reference}, {TOKENS} tokens: largest logit difference "
            f"{found.max_logit_error:.1e} (bound {bound}), greedy tokens agree at "
            f"{found.greedy_agreement:.1%}"
        )


def _refuse(options: dict[str, Any], why: str) -> None:
    """UserError for options that were given and would do nothing."""
    for name, value in options.items():
        if value is not None:
            raise UserError(f"{name} {why}")


def _layer_choice(text: str) -> tuple[str, int | None]:
    pattern, _, bits = text.rpartition("=")
    if not pattern or not (bits == "none" or bits.isdigit()):
        raise UserError(
            f"--q-layer takes PATTERN=BITS, as in lm_head=8 or v_proj=none, not {text!r}"
        )
    return pattern, None if bits == "none" else int(bits)
