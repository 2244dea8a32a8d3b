"""`mlx-sleep train`: run a recipe."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .output import line, note, progress_bar, stderr

if TYPE_CHECKING:  # it imports MLX
    from ..training.trainer import Trainer


def train(
    task: Annotated[str, typer.Argument(help="The task: memory.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe in the package by name, or a .json file.")
    ] = "embedded",
    out: Annotated[
        Path | None,
        typer.Option(
            help="The run's folder; an unfinished run there goes on. (default: runs/RECIPE)"
        ),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="A model folder to start from, in place of random weights.")
    ] = None,
    passes: Annotated[
        int | None, typer.Option(help="Passes of every sleep, in place of the recipe's.")
    ] = None,
    checkpoint_passes: Annotated[
        bool,
        typer.Option(help="Keep only the blocks' inputs for the backward pass: memory for time."),
    ] = False,
    save_every: Annotated[int, typer.Option(help="Steps between two checkpoints.")] = 100,
):
    """Train a model through sleep, as in Algorithm 1 of the paper.

    OUT gets the recipe, metrics.jsonl, checkpoints, and the finished model in OUT/model.
    Kill it at any time: the same command goes on from the last checkpoint, to the same losses.

    Example: mlx-sleep train memory --recipe embedded --out runs/embedded

    On two processes: mlx.launch -n 2 --backend ring -- .venv/bin/mlx-sleep train memory
    """
    import mlx.core as mx

    from ..lab.memory_training import make_trainer, sentencepiece_encoder
    from ..lab.tasks.memory import END, PAD
    from ..models.checkpoint import TRAINING
    from ..models.load import EMBEDDED, save
    from ..training.recipe import TASKS, read_recipe

    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if save_every < 1:
        raise UserError("--save-every must be at least 1")
    settings = read_recipe(recipe)
    if settings["task"] != task:
        raise UserError(f"the recipe {recipe} is for the task {settings['task']!r}, not {task!r}")
    if passes is not None:
        if passes < 1:
            raise UserError(f"a sleep needs at least 1 pass, not {passes}")
        settings["model"].setdefault("sleep", {})["passes"] = passes
        for stage in settings["stages"]:
            stage["passes"] = passes
    out = out or Path("runs") / Path(recipe).stem
    trainer = make_trainer(
        settings,
        out,
        EMBEDDED,
        start=start,
        checkpoint_passes=checkpoint_passes,
        save_every=save_every,
    )
    first = mx.distributed.init().rank() == 0
    try:
        with _progress(trainer, first) as on_step:
            trainer.run(on_step)
    except KeyboardInterrupt:
        if first:
            note(f"stopped; the same command goes on from {out / 'checkpoint'}")
        raise typer.Exit(130) from None
    if first:
        _, _, specials = sentencepiece_encoder(EMBEDDED)
        config = {
            **settings["model"],
            "eos_token_id": specials[END],
            "pad_token_id": specials[PAD],
            TRAINING: {"recipe": recipe, "tokens": trainer.tokens, "steps": trainer.step},
        }
        save(out / "model", trainer.model, config, tokenizer_source=EMBEDDED, overwrite=True)
        line(f"wrote {out / 'model'}; talk to it: mlx-sleep chat --model {out / 'model'}")


@contextlib.contextmanager
def _progress(trainer: Trainer, shown: bool) -> Iterator[Callable[[dict], None] | None]:
    """on_step for a trainer: a bar on a terminal, a line now and then in a log."""
    means: dict[str, float] = {}

    def text(row: dict) -> str:
        for name in ("loss", "accuracy"):  # over about the last 20 steps
            means[name] = row[name] + 0.95 * (means.get(name, row[name]) - row[name])
        return (
            f"loss {means['loss']:.3f}  accuracy {means['accuracy']:.3f}  N={row['passes']}  "
            f"{row['tokens'] / 1e6:.2f}M tokens  {row['tokens_per_second']:,.0f} tokens/s"
        )

    def log(row: dict) -> None:
        now = text(row)
        if row["step"] % 20 == 0 or row["step"] == trainer.steps:
            note(f"step {row['step']}/{trainer.steps}  {now}")

    if not shown:
        yield None
    elif stderr().is_terminal:
        with progress_bar("training", total=trainer.steps, unit="steps") as update:
            yield lambda row: update(row["step"], text=text(row))
    else:
        yield log
