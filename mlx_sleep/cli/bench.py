"""`mlx-sleep bench`: speed on this machine; what is compared is timed in turn."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from .model_names import choose
from .options import AdapterPath, Json, Model, Numbers, PassesToTry, numbers
from .output import Plot, emit, progress_bar

if TYPE_CHECKING:  # it imports MLX
    from ..models.base import SleepModel

app = typer.Typer(add_completion=False, no_args_is_help=True)

PlotFile = Annotated[
    Path | None, typer.Option("--plot", help="Draw the rows into this file (.png, .svg, .pdf).")
]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds; medians are taken over them.")]
History = Annotated[
    Numbers,
    typer.Option(
        parser=numbers("--history"), metavar="N,...", help="Tokens of history, with commas."
    ),
]


PASSES, TRAINING_PASSES = Numbers((1, 2, 4, 8)), Numbers((1, 2, 4))
WINDOWS = Numbers((100, 1000, 4000))
HISTORY = Numbers((512, 1024, 2048, 4096, 8192, 16384))


@app.callback()
def _bench():
    """Measure speed on this machine.

    Example: mlx-sleep bench wake
    """


@app.command()
def ops(json: Json = False, plot: PlotFile = None, repeats: Repeats = 3):
    """Time the ops against MLX's and mlx-lm's, forward and backward. It takes some minutes.

    `ratio` is their time over ours: above 1, ours is faster.

    Example: mlx-sleep bench ops --json
    """
    from ..lab.bench import ops

    _run("bench ops", ops, ops.rows(repeats), json, plot)


@app.command()
def kernels(
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 2048,
    json: Json = False,
    plot: PlotFile = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write the rows as Markdown, with date and device."),
    ] = None,
):
    """Time the Metal kernels on a Mac's GPU, against MLX's and mlx-lm's.

    `ratio` is the time of what a kernel is compared to over its own: above 1, ours is faster.

    Example: mlx-sleep bench kernels --report REPORT.md
    """
    from ..lab.bench import kernels

    measured = _run("bench kernels", kernels, kernels.rows(tokens), json, plot)
    if report:
        kernels.report(measured, report)


@app.command()
def wake(
    model: Model = None,
    adapter_path: AdapterPath = None,
    passes: PassesToTry = PASSES,
    history: History = HISTORY,
    json: Json = False,
    plot: PlotFile = None,
    repeats: Repeats = 5,
):
    """Time a token after sleeps of N passes, and (passes 0) with the whole KV cache kept.

    Example: mlx-sleep bench wake --history 512,4096 --plot wake.png
    """
    from ..lab.bench import wake

    loaded = _load(model, adapter_path)
    _run("bench wake", wake, wake.rows(loaded, passes, history, repeats), json, plot)


@app.command()
def reply(
    model: Model = None,
    adapter_path: AdapterPath = None,
    window: Annotated[
        Numbers,
        typer.Option(
            parser=numbers("--window"), metavar="N,...", help="Tokens in the window, with commas."
        ),
    ] = WINDOWS,
    json: Json = False,
    plot: PlotFile = None,
    repeats: Repeats = 5,
):
    """Time a reply of a chat, which decodes as chats do, against mlx_lm.generate.

    `ratio` is the chat's tokens a second over mlx-lm's, with the same model and window; sleep
    layers are the chat's alone.

    Example: mlx-sleep bench reply --model smollm2 --window 100,1000
    """
    from ..lab.bench import reply
    from ..models.load import load

    chosen = choose(model, adapter_path)
    loaded, tokenizer, _ = load(chosen.open(), adapter=chosen.adapter)
    _run("bench reply", reply, reply.rows(loaded, tokenizer, window, repeats), json, plot)


@app.command()
def sleep(
    model: Model = None,
    adapter_path: AdapterPath = None,
    passes: PassesToTry = PASSES,
    json: Json = False,
    plot: PlotFile = None,
    repeats: Repeats = 5,
):
    """Time a sleep of N passes against N times the prefill, and how soon it can be cancelled.

    Example: mlx-sleep bench sleep
    """
    from ..lab.bench import sleep

    loaded = _load(model, adapter_path)
    _run("bench sleep", sleep, sleep.rows(loaded, passes, repeats=repeats), json, plot)


@app.command()
def train(
    passes: PassesToTry = TRAINING_PASSES,
    json: Json = False,
    plot: PlotFile = None,
    repeats: Repeats = 5,
):
    """Time a training step through N passes against the same in PyTorch. Needs the torch extra.

    `ratio` is PyTorch's time over ours: above 1, ours is faster.

    Example: mlx-sleep bench train
    """
    from ..lab.study import training_speed as train

    _run("bench train", train, train.rows(passes, repeats), json, plot)


@app.command()
def data(json: Json = False, plot: PlotFile = None, repeats: Repeats = 5):
    """Time how long a training batch takes to make, for every plan of `mlx-sleep study`.

    Example: mlx-sleep bench data
    """
    from ..lab.study import data_speed as data

    _run("bench data", data, data.rows(repeats), json, plot)


@app.command()
def convert(
    gigabytes: Annotated[float, typer.Option(min=0.01, help="Size of the checkpoint.")] = 4.0,
    shard_gigabytes: Annotated[float, typer.Option(min=0.001, help="Size of its files.")] = 1.0,
    folder: Annotated[
        Path | None, typer.Option(help="Where it is written, with room for two copies.")
    ] = None,
    json: Json = False,
):
    """Convert a checkpoint of random numbers: peak memory against its largest file.

    Example: mlx-sleep bench convert --gigabytes 8
    """
    from ..lab.bench import conversion as convert

    rows = convert.rows(gigabytes, shard_gigabytes, folder)
    _run("bench convert", convert, rows, json, None)


def _load(model: str | None, adapter_path: str | None) -> SleepModel:
    from ..models.load import load_model, suit_device

    given = model is not None or adapter_path is not None
    chosen = choose(model if given else "embedded", adapter_path)
    loaded, _ = load_model(chosen.open(), adapter_path=chosen.adapter)
    suit_device(loaded)
    return cast("SleepModel", loaded)


def _run(
    command: str, bench: Any, rows: Iterable[dict], json: bool, plot: Path | None
) -> list[dict]:
    """Measure, with a count of the rows on a terminal, show the result and return it."""
    picture = Plot(plot) if plot else None
    measured: list[dict] = []
    with progress_bar(command, unit="rows") as update:
        for row in rows:
            measured.append(row)
            update(len(measured))
    emit(command, measured, json)
    if picture:
        bench.plot(measured, picture.axes)
        picture.save()
    return measured
