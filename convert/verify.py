"""Compares a converted folder with its source: logits with PyTorch's, and bytes."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..models.load import load_model
from ..models.weights import weight_files
from ..utils.errors import UserError
from ..utils.files import one_line, read_json
from ..utils.safetensors import array_bytes, load
from .pipeline import REPORT
from .sources import Source, open_source

TOKENS = 48
"""Length of the random prompt that source and result are compared on."""


@dataclass(frozen=True)
class Verified:
    """What was found.

    reference          whose code ran the source; None: only bytes were compared
    max_logit_error    the largest |ours - theirs|
    greedy_agreement   the part of positions, 0 to 1, with the same largest logit
    same_bytes         tensors whose bytes are the source's
    rewritten          tensors that were cast, computed or quantized
    why                why the source could not be run in PyTorch
    """

    reference: str | None = None
    max_logit_error: float = 0.0
    greedy_agreement: float = 0.0
    same_bytes: int = 0
    rewritten: int = 0
    why: str = ""


def verify(source: str | Path, dest: str | Path) -> Verified:
    """Compare a converted folder with its source; see Verified.

    UserError when the folder on disk is not what the conversion wrote.
    """
    dest = Path(dest).expanduser()
    with tempfile.TemporaryDirectory() as scratch:
        opened = open_source(source, Path(scratch))
        same, rewritten = _compare_bytes(opened, dest)
        missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
        if missing:
            return Verified(same_bytes=same, rewritten=rewritten, why=f"no {missing[0]} here")
        import torch

        from .references import reference_model

        model, config = load_model(dest)
        vocabulary = {**config, **(config.get("text_config") or {})}["vocab_size"]
        tokens = np.random.default_rng(0).integers(0, vocabulary, (1, TOKENS))
        try:
            with torch.no_grad():
                name, run = reference_model(opened)
                theirs = run(torch.from_numpy(tokens)).float().numpy()
        except (ImportError, LookupError) as error:
            return Verified(same_bytes=same, rewritten=rewritten, why=one_line(error)[:200])
        ours = np.array(model(mx.array(tokens))[0].astype(mx.float32))
    largest = float(np.abs(ours - theirs).max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return Verified(name, largest, agreement, same, rewritten)


def _compare_bytes(source: Source, dest: Path) -> tuple[int, int]:
    """(tensors with the source's bytes, others): what is on disk, read by another library."""
    from safetensors import safe_open

    rows = {row["name"]: row for row in read_json(dest / REPORT)["tensors"]}
    origins = {original: name for name, original in source.origins.items()}
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
                original = origins.get(row["from"][0], row["from"][0])
                if _digest(source.tensors[original]) != digest:
                    raise UserError(f"{name} in {file} is not {original} of the source")
                same += 1
            del x
            mx.clear_cache()
    return same, len(rows) - same


def _digest(x: mx.array) -> str:
    return hashlib.sha256(array_bytes(x)).hexdigest()
