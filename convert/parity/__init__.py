"""Our models against PyTorch's, on the same weights: what `mlx-sleep models parity` shows.

A module of this package with a function `run() -> Iterator[Case]` compares one or more
architectures; modules that end in _torch hold PyTorch models for it. Torch is imported when a
comparison runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from ...errors import UserError


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


def modules() -> list[str]:
    """The modules that compare."""
    names = (info.name for info in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if not name.endswith("_torch"))


def run(architectures: list[str] | None = None) -> Iterator[Case]:
    """All cases, or those of some architectures. UserError without torch."""
    for extra in ("torch", "transformers"):
        if find_spec(extra) is None:
            raise UserError(f"parity needs {extra}; pip install 'mlx-sleep[torch]'")
    from transformers.utils import logging

    logging.set_verbosity_error()  # it tells of each fast kernel that it does without
    logging.disable_progress_bar()
    for name in modules():
        for case in importlib.import_module(f"{__name__}.{name}").run():
            if not architectures or case.architecture in architectures:
                yield case
