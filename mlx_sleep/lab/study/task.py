"""The data of a study: makes the task that a plan names."""

from __future__ import annotations

from pathlib import Path

from ...utils.atomic import replace_file
from ...utils.errors import UserError
from ..tasks.depo import Depo
from ..tasks.gsm import Gsm, make_tokenizer
from ..tasks.rule110 import Rule110

TOKENIZER = "tokenizer.model"  # in the study's folder

Task = Depo | Gsm | Rule110


def make_task(settings: dict, tokenizer: Path | None = None) -> Task:
    """The task of a plan or of a run's settings.

    tokenizer: the file that gsm reads its tokenizer from, or writes it to. UserError when the
    plan's world does not fit the task.
    """
    world = {**settings["world"]}
    try:
        if settings["task"] == "gsm":
            return Gsm(tokenizer=_tokenizer(world, tokenizer), **world)
        return {"rule110": Rule110, "depo": Depo}[settings["task"]](**world)
    except (TypeError, ValueError) as error:
        raise UserError(f"the plan's world does not fit {settings['task']}: {error}") from None


def _tokenizer(world: dict, path: Path | None) -> bytes:
    """The contents of the file, or a new tokenizer that is then written there.

    The tokenizer's own options are taken out of `world`.
    """
    options = {key: world.pop(key) for key in ("vocab_size", "phrases") if key in world}
    if path is not None and path.exists():
        return path.read_bytes()
    if "names" in world:
        options["names"] = world["names"]
    try:
        data = make_tokenizer(**options)
    except (RuntimeError, OSError) as error:  # sentencepiece's, for a size it can't make
        raise UserError(f"no tokenizer with {options}: {error}") from None
    if path is not None:
        replace_file(path, data)
    return data
