"""`mlx-sleep train` and `mlx-sleep eval`: run a recipe, and ask a model what it remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..utils.errors import UserError
from .options import Json, Model, Numbers, names, numbers
from .output import emit, line, note, progress_bar, stderr

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
        }
        save(out / "model", trainer.model, config, tokenizer_source=EMBEDDED, overwrite=True)
        line(f"wrote {out / 'model'}; talk to it: mlx-sleep chat --model {out / 'model'}")


def evaluate(
    task: Annotated[str, typer.Argument(help="The task: memory.")],
    model: Model = None,
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
    n: Annotated[int, typer.Option(help="Conversations for each case.")] = 500,
    seed: Annotated[int, typer.Option(help="Picks the set of conversations.")] = 0,
    split: Annotated[str, typer.Option(help="Names and values of: train, valid, test.")] = "test",
    json: Json = False,
):
    """Ask a model about what it was told before it slept; exact answers count.

    `zeroed` is the same with the fast weights set to zero after the last sleep.

    Example: mlx-sleep eval memory --passes 1,2,4
    """
    from ..lab.evaluation import evaluate_memory
    from ..lab.memory_training import sentencepiece_encoder
    from ..lab.tasks.memory import CASES, MemoryTask
    from ..lab.tasks.words import SPLITS
    from ..models.load import EMBEDDED, load_model
    from ..training.recipe import TASKS

    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    cases = names(case) or list(CASES)
    if unknown := sorted(set(cases) - set(CASES)):
        raise UserError(f"unknown case {unknown[0]!r}; known: {', '.join(CASES)}")
    if n < 1:
        raise UserError("--n must be at least 1")
    folder = Path(model) if model else EMBEDDED
    loaded, _ = load_model(folder)
    encode, decode, specials = sentencepiece_encoder(folder)
    with progress_bar("eval memory", unit="conversations", shown=not json) as update:
        rows = evaluate_memory(
            loaded,
            MemoryTask(encode, specials, split, seed=seed),
            decode,
            cases=cases,
            passes=passes or [loaded.sleep.passes],
            n=n,
            on_batch=update,
        )
    emit("eval memory", rows, json)


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
