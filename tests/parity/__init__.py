"""Our models against PyTorch's, on the same weights: what `make parity` shows.

A module of this package compares the architectures in its ARCHITECTURES: `pairs(architecture, rng)`
gives each as a Pair, or several for the options of its config, and `cases` compares it. SEED is of
the random weights and tokens. Torch is imported when a comparison runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType

import numpy as np

from mlx_sleep.utils.errors import UserError
from mlx_sleep.utils.pip import pip_install

from .cases import CASES, Compared, Pair, compare

__all__ = ["CASES", "Case", "Compared", "Pair", "compare", "compared", "rows", "run"]

TRANSFORMERS = "5.24"
"""The oldest transformers whose models can be compared: earlier caches and kernels differ."""
MODULES = ("fla", "jet_nemotron", "mlx_lm", "naive", "ouro", "rwkv7", "sleep_hybrid")


@dataclass(frozen=True)
class Case:
    """One comparison of logits: the worst of all configs of an architecture.

    architecture      ours (model_type)
    reference         whose PyTorch code gave the other logits
    case              one of CASES
    max_logit_error   the largest |ours - theirs|
    greedy_agreement  the part of positions, 0 to 1, where both have the same largest logit
    """

    architecture: str
    reference: str
    case: str
    max_logit_error: float
    greedy_agreement: float


def run(architectures: list[str] | None = None) -> Iterator[Case]:
    """All cases, or those of some architectures. UserError without torch, or for an unknown one."""
    for extra in ("torch", "transformers"):
        if find_spec(extra) is None:
            raise UserError(f"parity needs {extra}; {pip_install('mlx-sleep[torch]')}")
    if _series(version("transformers")) < _series(TRANSFORMERS):
        raise UserError(f"parity needs transformers {TRANSFORMERS} or newer; update it")
    known = [(name, module) for module in _modules() for name in module.ARCHITECTURES]
    names = list(dict.fromkeys(name for name, _ in known))
    if unknown := [name for name in architectures or () if name not in names]:
        raise UserError(f"no comparison of {unknown[0]!r}; there are: {', '.join(names)}")
    from transformers.utils import logging

    logging.set_verbosity_error()  # it tells of each fast kernel that it does without
    logging.disable_progress_bar()
    for name, module in known:
        if not architectures or name in architectures:
            yield from rows(module, name)


def rows(module: ModuleType, architecture: str) -> Iterator[Case]:
    """One Case for each reference and case: the worst of the architecture's pairs."""
    found: dict[tuple[str, str], list[Compared]] = {}
    for pair, c in compared(module, architecture, np.random.default_rng(module.SEED)):
        found.setdefault((pair.reference, c.case), []).append(c)
    for (reference, case), comparisons in found.items():
        error = np.max([c.error for c in comparisons])  # not max(), which may let a NaN go
        agreement = min(c.agreement for c in comparisons)
        yield Case(architecture, reference, case, float(error), agreement)


def compared(
    module: ModuleType, architecture: str, rng: np.random.Generator
) -> Iterator[tuple[Pair, Compared]]:
    """All cases of all pairs of one architecture, on fresh weights and tokens."""
    for pair in module.pairs(architecture, rng):
        for c in compare(pair, rng):
            yield pair, c


def _modules() -> list[ModuleType]:
    return [import_module(f"{__name__}.{name}") for name in MODULES]


def _series(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")[:2]))
