"""Our models against PyTorch's, on the same weights: what `make parity` shows.

A module of this package compares the architectures in its ARCHITECTURES, each by `run(architecture)
-> Iterator[Case]`. Torch is imported when a comparison runs.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from mlx_sleep.utils.errors import UserError


@dataclass(frozen=True)
class Case:
    """One comparison of logits.

    architecture      ours (model_type)
    reference         whose PyTorch code gave the other logits
    case              prefill, steps, padded, sleep_1, sleep_2, sleep_3 or evicted
    max_logit_error   the largest |ours - theirs|
    greedy_agreement  the part of positions, 0 to 1, where both have the same largest logit
    """

    architecture: str
    reference: str
    case: str
    max_logit_error: float
    greedy_agreement: float


CASES = ("prefill", "steps", "padded", "sleep_1", "sleep_2", "sleep_3", "evicted")


def worst(
    architecture: str, compared: Iterable[tuple[str, str, np.ndarray, np.ndarray]]
) -> Iterator[Case]:
    """One Case for each (reference, case) of (reference, case, our logits, theirs): the worst."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for reference, case, ours, theirs in compared:
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
        found.setdefault((reference, case), []).append((np.abs(ours - theirs).max(), agreement))
    for key, figures in found.items():
        yield worst_of(architecture, *key, figures)


def worst_of(
    architecture: str, reference: str, case: str, figures: Iterable[tuple[float, float]]
) -> Case:
    """The Case of some (error, agreement)."""
    errors, agreements = zip(*figures, strict=True)
    # Not max(), which may let a NaN go.
    return Case(architecture, reference, case, float(np.max(errors)), float(min(agreements)))


def _modules() -> list[ModuleType]:
    names = sorted(info.name for info in pkgutil.iter_modules(__path__))
    return [import_module(f"{__name__}.{name}") for name in names if name != "__main__"]


def run(architectures: list[str] | None = None) -> Iterator[Case]:
    """All cases, or those of some architectures. UserError without torch, or for an unknown one."""
    for extra in ("torch", "transformers"):
        if find_spec(extra) is None:
            raise UserError(f"parity needs {extra}; pip install 'mlx-sleep[torch]'")
    known = {name: module for module in _modules() for name in module.ARCHITECTURES}
    if unknown := [name for name in architectures or () if name not in known]:
        raise UserError(f"no comparison of {unknown[0]!r}; there are: {', '.join(known)}")
    from transformers.utils import logging

    logging.set_verbosity_error()  # it tells of each fast kernel that it does without
    logging.disable_progress_bar()
    for name, module in known.items():
        if not architectures or name in architectures:
            yield from module.run(name)
