"""Compares a converted folder with its source: bytes, values, and logits with PyTorch's.

The source is never read by the code that converted it alone: safetensors are compared by a digest
of what is on disk, a GGUF with the values of the package `gguf`, and logits with PyTorch's.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..models.load import load_model
from ..models.weights import weight_files
from ..utils.errors import UserError
from ..utils.files import expanded, one_line
from ..utils.safetensors import array_bytes, load
from .gguf_reference import Reference
from .mapping import without_wrappers
from .pipeline import REPORT, read_report
from .sources import Source, open_source

TOKENS = 48
"""Length of the random prompt that source and result are compared on."""

EXACT, ROUNDED = 1e-3, 0.2
"""What logits, computed in float32, may differ, as a part of the largest of them: where no weight
was rounded, and where some were rounded to 16 bits, which grows over the layers."""


@dataclass(frozen=True)
class Verified:
    """What was found.

    reference          whose code ran the source; None: only bytes were compared
    max_logit_error    the largest |ours - theirs|
    bound              what it may be; None: the result is quantized, so any
    greedy_agreement   the part of positions, 0 to 1, with the same largest logit
    same_bytes         tensors whose bytes are the source's
    rewritten          tensors that were cast, computed, dequantized or quantized
    why                why the source could not be run in PyTorch
    """

    reference: str | None = None
    max_logit_error: float = 0.0
    bound: float | None = None
    greedy_agreement: float = 0.0
    same_bytes: int = 0
    rewritten: int = 0
    why: str = ""


def verify(source: str | Path, dest: str | Path, **where: Any) -> Verified:
    """Compare a converted folder with its source; see Verified. where: as in `convert`.

    UserError when the folder on disk is not what the conversion wrote, when its logits are further
    from the source's than the bound, or when a greedy token is another by more than a quarter of
    it. It then names the tensor that differs most.
    """
    dest = expanded(dest)
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(source, Path(scratch), **where)
        report = read_report(dest)
        rows = {row["name"]: row for row in report["tensors"]}
        same = _compare_bytes(opened, dest, rows)
        rewritten = len(rows) - same
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if missing:
            return Verified(same_bytes=same, rewritten=rewritten, why=f"no {missing[0]} here")
        import torch

        from .references import reference_model

        model, config = load_model(dest)
        vocabulary = {**config, **(config.get("text_config") or {})}["vocab_size"]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS))
        try:
            if report.get("merged"):
                _merge_naively(opened, Path(report["merged"]))
            with torch.no_grad():
                name, run = reference_model(opened)
                theirs = run(torch.from_numpy(tokens)).float().numpy()
        except (ImportError, LookupError) as error:
            return Verified(same_bytes=same, rewritten=rewritten, why=one_line(error)[:200])
        model.set_dtype(mx.float32)  # the weights are compared, not the type of the arithmetic
        ours = np.array(model(mx.array(tokens))[0].astype(mx.float32))
        largest = float(np.abs(ours - theirs).max())
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
        bound = _bound(rows, float(np.abs(theirs).max()))
        if bound is not None and not (largest <= bound and _parted(ours, theirs) <= bound / 4):
            raise UserError(
                f"{dest} is not what {name} computes: largest logit difference {largest:.1e} "
                f"(bound {bound:.1e}), greedy tokens agree at {agreement:.1%}; "
                f"{_worst(opened, dest, rows)}"
            )
    return Verified(name, largest, bound, agreement, same, rewritten)


def _parted(ours: np.ndarray, theirs: np.ndarray) -> float:
    """By how much the source prefers its own greedy token to ours, where they part most."""
    chosen = np.take_along_axis(theirs, ours.argmax(-1)[..., None], -1)[..., 0]
    return float((theirs.max(-1) - chosen).max())


def _merge_naively(source: Source, adapter: Path) -> None:
    """Change the source's tensors by the adapter that `convert` merged; none of its code runs."""
    from .merging_reference import merged

    if source.origins or not (adapter / "adapter_config.json").is_file():
        raise LookupError(f"the adapter {adapter} can't be read beside the source")
    for name, original in without_wrappers(source.tensors).items():
        w = np.array(source.tensors[original].astype(mx.float32))
        source.tensors[original] = mx.array(merged(adapter, name, w).astype(np.float32))


def _bound(rows: dict[str, dict], largest: float) -> float | None:
    """For logits as large as `largest`, with what was done to the tensors."""
    if any("quantized" in row["how"].split(", ") for row in rows.values()):
        return None
    rounded = any(
        row["how"] != "as it is" and row["dtype"] in ("float16", "bfloat16")
        for row in rows.values()
    )
    return largest * (ROUNDED if rounded else EXACT)


def _worst(source: Source, dest: Path, rows: dict[str, dict]) -> str:
    """The tensor whose values are furthest from the source's, for an error."""
    theirs = _values_of(source)
    ours: dict[str, mx.array] = {}
    for file in weight_files(dest):
        ours.update(load(file)[0])
    worst, most = "", 0.0
    for name, row in rows.items():
        if len(row["from"]) != 1 or f"{name.removesuffix('.weight')}.scales" in ours:
            continue
        x = theirs(name, row)
        y = np.array(ours[name].astype(mx.float32))
        if x is None or x.shape != y.shape:
            continue
        error = float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30))
        if not error <= most:
            worst, most = name, error
        mx.clear_cache()
    if not worst:
        return "no tensor differs, so the config is taken otherwise"
    return f"the tensor that differs most is {worst}, by {most:.1e} of its largest value"


def _values_of(source: Source) -> Callable[[str, dict], np.ndarray | None]:
    """A function of (name, row of the report): the source's tensor, float32."""
    if source.origins:
        reference = Reference(source.files)
        return lambda name, row: reference.values(name) if reference.has(name) else None

    def values(name: str, row: dict) -> np.ndarray | None:
        x = source.tensors.get(row["from"][0])
        return None if x is None else np.array(x.astype(mx.float32))

    return values


def _compare_bytes(source: Source, dest: Path, rows: dict[str, dict]) -> int:
    """How many tensors have the source's bytes: what is on disk, read by another library.

    UserError for one that should have and has not.
    """
    from safetensors import safe_open

    same = 0
    for file in weight_files(dest):
        loaded, _ = load(file)
        with safe_open(file, "np") as opened:
            names = set(opened.keys())
        if names != set(loaded) or not names <= set(rows):
            raise UserError(f"{file} holds other tensors than {REPORT} says; convert again")
        for name in sorted(names):
            x = loaded.pop(name)
            row = rows[name]
            digest = _digest(x)
            if digest != row["sha256"] or list(x.shape) != row["shape"]:
                raise UserError(f"{name} in {file} is not what was written; convert again")
            if row["how"] == "as it is" and row["from"]:
                (original,) = row["from"]
                if not source.origins and _digest(source.tensors[original]) != digest:
                    raise UserError(f"{name} in {file} is not {original} of the source")
                same += 1
            del x
            mx.clear_cache()
    if source.origins:
        _compare_decoded(Reference(source.files), dest, rows)
    return same


def _compare_decoded(reference: Reference, dest: Path, rows: dict[str, dict]) -> None:
    """UserError for a tensor of a GGUF that the package `gguf` decodes otherwise."""
    ours: dict[str, mx.array] = {}
    for file in weight_files(dest):
        ours.update(load(file)[0])
    for name in [name for name in ours if name.endswith((".weight", ".bias"))]:
        x, layer, row = ours.pop(name), name.removesuffix(".weight"), rows[name]
        scales, biases = (ours.pop(f"{layer}.{part}", None) for part in ("scales", "biases"))
        how = {rows[part]["how"] for part in (name, f"{layer}.scales") if part in rows}
        if not row["from"] or not how <= {"as it is", "dequantized"}:
            continue
        want = reference.values(name)
        if scales is not None and biases is not None:
            scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            bits = x.shape[-1] // scales.shape[-1]  # 32 in a group
            x = mx.dequantize(x, scales, biases, group_size=32, bits=bits)
        elif "dequantized" in how:
            want = np.array(mx.array(want).astype(x.dtype).astype(mx.float32))
        if not np.array_equal(np.array(x.astype(mx.float32)), want):
            raise UserError(
                f"{name} in {dest} is not what the package gguf makes of {row['from'][0]}"
            )
        mx.clear_cache()


def _digest(x: mx.array) -> str:
    return hashlib.sha256(array_bytes(x)).hexdigest()
