"""What a session is made of, opened by name: a model, its tokenizer, its sampling and a memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, cast

from .chat_template import ChatTokenizer
from .memory import Memory
from .models.base import SleepModel
from .models.checkpoint import Checkpoint
from .models.load import EMBEDDED, generation_of, load
from .models.source import fingerprint, open_folder
from .sampling import Sampling
from .thoughts import Thinking

OWN_ADAPTERS = EMBEDDED.with_name("adapters")
"""Those of the package belong to the models of their names, wherever it is installed."""


class Parts(NamedTuple):
    model: SleepModel
    tokenizer: ChatTokenizer
    memory: Memory | None
    sampling: Sampling


def open_parts(
    model: str | Path | Checkpoint | None,
    memory: str | None,
    adapter: str | Path | None,
    home: str | os.PathLike | None,
    thinking: Thinking,
) -> Parts:
    """See `Session.open`. The memory comes last: where it raises, nothing is open."""
    source = model if isinstance(model, Checkpoint) else open_folder(model or EMBEDDED)
    sampling = Sampling.of(generation_of(source.path, adapter))
    loaded, tokenizer, _ = load(source, adapter=adapter, thinking=thinking)
    opened = None
    if memory is not None:
        name = "embedded" if source.path == EMBEDDED else source.name
        if adapter is not None and Path(adapter).parent != OWN_ADAPTERS:
            name += f" with {adapter}"
        opened = Memory.open(memory, fingerprint(source, adapter), model=name, home=home)
    return Parts(cast(SleepModel, loaded), tokenizer, opened, sampling)
