"""`mlx-sleep eval`: ask a model what it remembers, and whether it still is what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .model_names import choose
from .options import (
    AdapterPath,
    Json,
    LocalFilesOnly,
    Model,
    Numbers,
    Revision,
    names,
    numbers,
)
from .output import emit, progress_bar

if TYPE_CHECKING:  # it imports MLX
    from ..models.checkpoint import Checkpoint

TASKS = ("memory", "base")


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            help="memory: what it was told before it slept; base: how near it is to its base."
        ),
    ],
    model: Model = None,
    adapter_path: AdapterPath = None,
    revision: Revision = None,
    local_files_only: LocalFilesOnly = False,
    passes: Annotated[
        Numbers | None,
        typer.Option(
            parser=numbers("--passes"),
            metavar="N,...",
            help="Passes to try, as in 1,2,4. (default: the model's)",
        ),
    ] = None,
    case: Annotated[
        str | None, typer.Option(help="Only these cases, with commas. (default: all)")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option(
            help="Conversations for each case. (default: 500; 200 of lives, all of natural)"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Picks the set of conversations.")] = 0,
    split: Annotated[str, typer.Option(help="Names and values of: train, valid, test.")] = "test",
    json: Json = False,
):
    """Ask a model about what it was told before it slept; exact answers count.

    `zeroed` is the same with the fast weights set to zero after the last sleep. A model with a
    chat template is asked about lives (re_asked_1 ..., new_words, pronoun, ...) and about
    conversations written by hand (natural). `base` compares it with its base on ordinary chat.

    Example: mlx-sleep eval memory --passes 1,2,4
    """
    from ..lab.tasks.words import SPLITS

    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if n is not None and n < 1:
        raise UserError("--n must be at least 1")
    chosen = choose(model, adapter_path, revision, local_files_only)
    opened = chosen.open()
    cases, tried = names(case), list(passes) if passes else None
    with progress_bar(f"eval {task}", unit="conversations", shown=not json) as counted:
        if task == "base":
            rows = _base(opened, chosen.adapter, n, seed, split, counted)
        elif (opened.path / "tokenizer.model").is_file() and chosen.adapter is None:
            rows = _memory(opened, cases, tried, n or 500, seed, split, counted)
        else:
            rows = _lives(opened, chosen.adapter, cases, tried, n, seed, split, counted)
    emit(f"eval {task}", [{"model": chosen.name, **row} for row in rows], json)


def _memory(
    opened: Checkpoint, cases, passes, n: int, seed: int, split: str, counted
) -> list[dict]:
    """Of a model in the format of the task `memory`, as the embedded one."""
    from ..lab.evaluation import evaluate_memory
    from ..lab.memory_training import sentencepiece_encoder
    from ..lab.tasks.memory import CASES, MemoryTask
    from ..models.load import load_model

    loaded, _ = load_model(opened)
    encode, decode, specials = sentencepiece_encoder(opened.path)
    return evaluate_memory(
        loaded,
        MemoryTask(encode, specials, split, seed=seed),
        decode,
        cases=_known(cases, CASES),
        passes=passes or [loaded.sleep.passes],
        n=n,
        on_batch=counted,
    )


def _lives(
    opened: Checkpoint, adapter, cases, passes, n: int | None, seed: int, split: str, counted
) -> list[dict]:
    """Of a model with a chat template."""
    from ..lab.evaluate_chat import evaluate_lives, evaluate_natural
    from ..lab.tasks.life_examples import CASES

    chosen = _known(cases, (*CASES, "natural"))
    model, tokenizer, lives = _chat(opened, adapter, seed, split)
    passes = passes or [model.sleep.passes]
    rows: list[dict] = []
    for name in chosen:
        if name == "natural":
            rows += evaluate_natural(model, tokenizer, passes=passes, limit=n, on_done=counted)
        else:
            rows += evaluate_lives(
                model, tokenizer, lives, cases=[name], passes=passes, n=n or 200, on_done=counted
            )
    return rows


def _base(opened: Checkpoint, adapter, n, seed: int, split: str, counted) -> list[dict]:
    from ..lab.evaluate_chat import evaluate_base

    model, tokenizer, lives = _chat(opened, adapter, seed, split)
    if not hasattr(model, "host"):
        raise UserError(
            f"{opened.name} has no sleep layers, so it is its own base; add --adapter-path"
        )
    return evaluate_base(model, tokenizer, lives, n=n, on_done=counted)


def _chat(opened: Checkpoint, adapter, seed: int, split: str):
    """(model, tokenizer, lives of the split)"""
    from ..lab.tasks.chat_source import ChatSource
    from ..models.load import load
    from ..sleep import NOTHING_TO_SLEEP_INTO

    model, tokenizer, _ = load(opened, adapter=adapter)
    if not model.has_fast_weights:
        raise UserError(NOTHING_TO_SLEEP_INTO)
    return model, tokenizer, ChatSource(tokenizer, split, seed).lives()


def _known(cases: list[str] | None, known) -> list[str]:
    if unknown := sorted(set(cases or ()) - set(known)):
        raise UserError(f"unknown case {unknown[0]!r}; known: {', '.join(known)}")
    return cases or list(known)
